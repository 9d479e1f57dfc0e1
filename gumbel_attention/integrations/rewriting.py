"""Way 2: attention modules that write their softmax by hand, reached by rewriting the methods that do.

``rewritten(cls)`` is a subclass of ``cls`` whose methods are the originals, compiled once more from their source with
every softmax over keys replaced by a call of the module's child ``gumbel``. An instance is moved to it and back by
assigning ``__class__``: its parameters, buffers, hooks and attributes are never touched. Being ordinary methods, they
work under torch.compile, checkpointing and autocast as the originals do; tracebacks point into the original file.
"""

from __future__ import annotations
import __future__

import ast
import copy
import dataclasses
import functools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

from .patched_state import CHILD
from .softmax_source import Site, dim_argument, function_node, helper_sites, inner_function, resolve, sites

_STATE = "_gumbel_state"
_FUTURE = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
)
_NOTES = {
    r"Longformer\w*Attention|LEDEncoderSelfAttention": (
        "a softmax row holds a window of keys, and the keys with global attention; queries with global attention have "
        "a second softmax. Noise counts positions within these rows"
    ),
    r"BigBird\w*BlockSparseAttention": (
        "block-sparse: the first, second, middle, second last and last blocks of queries have a softmax each, over "
        "their own selection of keys. Noise counts positions within each"
    ),
    r"NystromformerSelfAttention": (
        "unless as many landmarks as keys: three softmaxes over landmarks or by landmarks, none over the keys of a "
        "query. Noise counts positions within each"
    ),
    r"PegasusXGlobalLocalAttention|LongT5(Local|TransientGlobal)Attention|(Gemma3n|Gemma4)AudioAttention": (
        "a softmax row holds a block of neighbouring keys, and global ones where there are any"
    ),
    r"LiltSelfAttention": "one softmax for the text and one for the layout: two choices for each query",
    r"ProphetNetNgramSelfAttention": "one softmax for the main stream and one for the predicting streams",
}


def softmax_calls(cls: type) -> list[str]:
    """The attention softmax calls in the methods of a module class that :func:`rewritten` replaces.

    Returns:
        ``"method: call"`` for each, those of base classes included; empty where there are none.
    """
    return [f"{plan.name}: {ast.unparse(site.node)}" for plan in _plans(cls).values() for site in plan.sites]


def notes(cls: type) -> str | None:
    """What is to be known about a class whose softmax rows are not one row of weights for each query."""
    return next((note for pattern, note in _NOTES.items() if re.fullmatch(pattern, cls.__name__)), None)


def original(cls: type) -> type:
    """The class that a rewritten one was made from; any other class itself."""
    found: type = vars(cls).get("_gumbel_original", cls)
    return found


def rewritten(cls: type) -> Any:
    """The subclass of ``cls`` whose attention softmax is asked of the child module ``gumbel``.

    Name, module and documentation are those of ``cls``; instances pickle and copy as patched ones. The same class
    gives the same subclass, and a rewritten one itself.

    Raises:
        ValueError: there is no softmax to replace, or a call in a form that cannot be replaced faithfully.
    """
    return cls if original(cls) is not cls else _subclass(cls)


@functools.cache
def _subclass(cls: type) -> type:
    plans = _plans(cls)
    if not plans:
        raise ValueError(f"{cls.__name__} has no attention softmax of its own that could be replaced.")
    methods = {new_name: plan.carried_out(cls) for new_name, plan in plans.items()}
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_gumbel_original": cls,
        **methods,
    }
    made: type = type(cls)(cls.__name__, (cls,), namespace)
    return made


def _reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickles by the original class, which can be imported; the rewritten one is made again on loading."""
    return _blank, (original(type(self)),), self.__getstate__()


def _blank(cls: type) -> Any:
    again = rewritten(cls)
    return again.__new__(again)


def _method_names(cls: type) -> list[str]:
    """The functions that instances of a class run, by name: constructors and torch's own left out."""
    own = [base for base in cls.__mro__ if not _is_foreign(base)]
    return list(dict.fromkeys(name for base in own for name in vars(base) if name != "__init__"))


def _is_foreign(cls: type) -> bool:
    return cls.__module__.split(".")[0] in ("torch", "builtins")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is to change in a method: softmax calls, and calls of overridden methods that change too."""

    owner: type
    name: str
    sites: tuple[Site, ...]
    supers: dict[ast.Call, str]

    def carried_out(self, cls: type) -> Any:
        """The method rewritten.

        Raises:
            ValueError: it is of a form that cannot be.
        """
        member = vars(self.owner)[self.name]
        where = f"{self.owner.__name__}.{self.name}"
        for call in self.supers:
            source = cast(ast.Attribute, call.func).value
            if cast(ast.Call, source).args:
                raise ValueError(f"{where} reaches its attention by {ast.unparse(source)}; write super().")
        if isinstance(member, classmethod):
            raise ValueError(f"the class method {where} computes attention; it has no module to ask.")
        static = isinstance(member, staticmethod)
        if static:
            _refuse_calls_by_class(cls, self.name)
        function = cast(types.FunctionType, inner_function(member))
        return _recompile(member, function, self.sites, self.supers, static=static, where=self.owner.__name__)


@functools.cache
def _plans(cls: type) -> dict[str, _Plan]:
    """What is to change in a class, by the name that the new method gets.

    A method that a subclass overrides and calls through ``super()`` gets a name of its own.
    """
    plans: dict[str, _Plan] = {}
    for name in _method_names(cls):
        _add_plan(plans, cls, next(base for base in cls.__mro__ if name in vars(base)), name, name)
    return plans


def _add_plan(plans: dict[str, _Plan], cls: type, owner: type, name: str, new_name: str) -> bool:
    """Plans the change of a method, and says whether there is any."""
    function = None if _is_foreign(owner) else inner_function(vars(owner)[name])
    if new_name in plans or function is None:
        return new_name in plans
    found = sites(function, cls)
    supers = {}
    for call, base in _super_calls(cls, owner, function):
        called = cast(ast.Attribute, call.func).attr
        private = f"_gumbel_{base.__name__.lstrip('_')}_{called}"
        if _add_plan(plans, cls, base, called, private):
            supers[call] = private
    if found or supers:
        plans[new_name] = _Plan(owner, name, found, supers)
    return new_name in plans


def _super_calls(cls: type, owner: type, function: types.FunctionType) -> Iterator[tuple[ast.Call, type]]:
    """Calls through ``super()``, and the class whose method each of them runs."""
    node = function_node(function) if "super" in function.__code__.co_names else None
    following = cls.__mro__[cls.__mro__.index(owner) + 1 :]
    for call in ast.walk(node) if node else ():
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        source = call.func.value
        if isinstance(source, ast.Call) and isinstance(source.func, ast.Name) and source.func.id == "super":
            base = next((base for base in following if call.func.attr in vars(base)), None)
            if base is not None:
                yield call, base


def _refuse_calls_by_class(cls: type, name: str) -> None:
    """Raises where a method of the class runs a static one as ``Class.name``, past the instance."""
    for caller in _method_names(cls):
        function = inner_function(getattr(cls, caller))
        if function is None or name not in function.__code__.co_names:
            continue
        node = function_node(function)
        for found in ast.walk(node) if node else ():
            if (
                isinstance(found, ast.Attribute)
                and found.attr == name
                and isinstance(resolve(found.value, function), type)
            ):
                raise ValueError(f"{cls.__name__} calls its static method by {ast.unparse(found)}; write self.{name}.")


def _recompile(
    member: Any,
    function: types.FunctionType,
    found: tuple[Site, ...],
    supers: dict[ast.Call, str],
    *,
    static: bool = False,
    where: str = "",
) -> Any:
    """``member`` with its calls replaced: the same globals, closure, defaults and decorators.

    A plain function (a helper, ``where=""``) gets the state as one more keyword, a static method becomes a method.
    """
    source = function_node(function)
    if source is None:
        raise ValueError(f"the source of {function.__qualname__} cannot be read.")
    node = copy.deepcopy(source)
    node.decorator_list = []
    is_helper = not where
    if static:
        node.args.posonlyargs[:0] = [] if not node.args.posonlyargs else [ast.arg("self")]
        if not node.args.posonlyargs:
            node.args.args.insert(0, ast.arg("self"))
    if is_helper:
        node.args.kwonlyargs.append(ast.arg(_STATE))
        node.args.kw_defaults.append(None)
        state: ast.expr = ast.Name(_STATE, ast.Load())
    else:
        arguments = [*node.args.posonlyargs, *node.args.args]
        state = ast.Attribute(ast.Name(arguments[0].arg, ast.Load()), CHILD, ast.Load())
    twins = {id(old): new for old, new in zip(_children(source), _children(node), strict=True)}
    helpers: dict[str, types.FunctionType] = {}
    replaced: dict[int, Callable[[ast.Call], ast.Call]] = {}
    for site in found:
        replaced[id(twins[id(site.node)])] = functools.partial(_replacement, site=site, state=state, helpers=helpers)
    for call, name in supers.items():
        replaced[id(twins[id(call)])] = functools.partial(_super_replacement, name=name, state=state)
    for site in found:
        if site.helper is not None:
            helpers[_helper_name(site.helper)] = _helper(site.helper)
    _Replace(replaced).visit(node)
    ast.fix_missing_locations(node)
    new = _with_code(function, _compiled(node, function, tuple(helpers), where), helpers)
    return _redecorated(member.__func__ if static else member, function, new)


def _children(node: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function's body, in a fixed order."""
    for statement in node.body:
        yield from ast.walk(statement)


@functools.cache
def _helper(function: types.FunctionType) -> types.FunctionType:
    made: types.FunctionType = _recompile(function, function, helper_sites(function), {})
    return made


def _helper_name(function: Any) -> str:
    return f"_gumbel_{function.__module__.replace('.', '_')}_{function.__name__}"


class _Replace(ast.NodeTransformer):
    def __init__(self, replaced: dict[int, Callable[[ast.Call], ast.Call]]) -> None:
        self.replaced = replaced

    def visit_Call(self, node: ast.Call) -> ast.AST:
        replace = self.replaced.get(id(node))
        self.generic_visit(node)
        return node if replace is None else ast.copy_location(replace(node), node)


def _replacement(call: ast.Call, site: Site, state: ast.expr, helpers: dict[str, Any]) -> ast.Call:
    """The call that takes the place of a softmax, on the same arguments."""
    if site.helper is not None:
        keywords = [*call.keywords, ast.keyword(_STATE, state)]
        return ast.Call(ast.Name(_helper_name(site.helper), ast.Load()), call.args, keywords)
    if site.kind == "attention":
        return ast.Call(ast.Attribute(state, "attention", ast.Load()), call.args, call.keywords)
    args, keywords = list(call.args), list(call.keywords)
    if site.kind == "tensor":
        assert isinstance(call.func, ast.Attribute)
        args = [call.func.value, *args]
    elif site.kind == "submodule":
        keywords.append(ast.keyword("dim", ast.Attribute(call.func, "dim", ast.Load())))
    elif site.kind == "constructor":
        dim = dim_argument(call, "constructor")
        assert dim is not None  # or it would be no site
        keywords.append(ast.keyword("dim", dim))
    keywords = [ast.keyword("scores" if k.arg == "input" else k.arg, k.value) for k in keywords]
    if len(args) > 2:
        raise ValueError(f"{ast.unparse(call)} has more positional arguments than scores and dim; name them.")
    return ast.Call(ast.Attribute(state, "softmax", ast.Load()), args, keywords)


def _super_replacement(call: ast.Call, name: str, state: ast.expr) -> ast.Call:
    assert isinstance(state, ast.Attribute)
    return ast.Call(ast.Attribute(state.value, name, ast.Load()), call.args, call.keywords)


def _compiled(
    node: ast.FunctionDef, function: types.FunctionType, extra: tuple[str, ...], class_name: str
) -> types.CodeType:
    """The code of the definition, compiled where its free variables are free and its class's private names resolve."""
    outer: ast.stmt = node
    if class_name:
        outer = ast.ClassDef(class_name, bases=[], keywords=[], body=[node], decorator_list=[])
        if hasattr(outer, "type_params"):
            outer.type_params = []
    free = [name for name in function.__code__.co_freevars if name != "__class__"]
    scope = ast.parse(f"def scope({', '.join([*free, *extra])}): pass")
    scope.body[0].body = [outer]  # type: ignore[attr-defined]  # a FunctionDef
    ast.fix_missing_locations(scope)
    flags = function.__code__.co_flags & _FUTURE
    module = compile(scope, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    code = next(c for c in _codes(module) if c.co_name == node.name and c.co_firstlineno == node.lineno)
    return code.replace(co_qualname=function.__code__.co_qualname)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _with_code(function: types.FunctionType, code: types.CodeType, extra: dict[str, Any]) -> types.FunctionType:
    """A function that differs from another in its code and in further closed-over values."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells.update({name: types.CellType(value) for name, value in extra.items()})
    closure = tuple(cells[name] for name in code.co_freevars)
    new: Any = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    functools.update_wrapper(new, function)
    del new.__wrapped__
    new.__kwdefaults__ = copy.copy(function.__kwdefaults__)
    return cast(types.FunctionType, new)


def _redecorated(member: Any, function: types.FunctionType, new: types.FunctionType) -> Any:
    """``new`` below the decorators of ``member``: each wrapper once more, with what it wraps exchanged."""
    if member is function:
        return new
    below = getattr(member, "__wrapped__", None)
    if not isinstance(member, types.FunctionType) or below is None:
        raise ValueError(f"{function.__qualname__} stands below a decorator of type {type(member).__name__}.")
    wrapped = _redecorated(below, function, new)
    cells = tuple(types.CellType(wrapped) if c.cell_contents is below else c for c in member.__closure__ or ())
    if cells == (member.__closure__ or ()):
        raise ValueError(f"the decorator of {function.__qualname__} does not keep the function it wraps in a closure.")
    again = types.FunctionType(member.__code__, member.__globals__, member.__name__, member.__defaults__, cells)
    functools.update_wrapper(again, wrapped)
    again.__kwdefaults__ = copy.copy(member.__kwdefaults__)
    return again
