"""Finds, in the source of a module's class, the softmax calls that turn scores of queries and keys into weights.

A call counts where the scores come out of a matrix product and the weights go into one, within the same function;
that leaves out gates, pooling by learned weights and convolution kernels, whose scores a linear layer gives. In a
class named attention, ``self.scores_of(query, key)`` counts as a product too, and so does a method that returns the
softmax of what it gets. A direct call of scaled_dot_product_attention always counts.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

SOFTMAXES = (nn.functional.softmax, torch.softmax, torch.special.softmax)
_WORDS = ("softmax", "Softmax", "scaled_dot_product_attention")
_PRODUCT = re.compile(r"matmul|bmm|einsum|(^|_)mm($|_)")
_NO_ATTENTION = re.compile(r"moe|router|gating|expert|indexer|quantizer|matcher", re.IGNORECASE)
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_LAST_DIMS = (-1, 2, 3)  # 2 and 3: the last ones of three- and four-dimensional scores


@dataclasses.dataclass(frozen=True)
class Site:
    """A call that can be replaced.

    Attributes:
        node: the call, in the tree of its file.
        kind: ``"function"``, ``"tensor"`` (a tensor's method), ``"constructor"`` (``nn.Softmax(...)(x)``),
            ``"submodule"``, ``"attention"`` (torch's whole attention) or ``"helper"`` (a function that contains one).
        helper: the function called, where it is a helper.
    """

    node: ast.Call
    kind: str
    helper: types.FunctionType | None = None


def sites(function: types.FunctionType, cls: type | None = None) -> tuple[Site, ...]:
    """The replaceable calls of a method of ``cls``, or of a plain function, in the order of the source."""
    if (cls is not None and _NO_ATTENTION.search(cls.__name__)) or not _may_contain(function, cls):
        return ()
    return _Reading(function, cls).attention_sites()


def inner_function(member: object) -> types.FunctionType | None:
    """The function as it stands in the source, below its decorators; ``None`` for what is no function."""
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    member = inspect.unwrap(member) if callable(member) and not isinstance(member, type) else member
    return member if isinstance(member, types.FunctionType) else None


@functools.cache
def function_node(function: types.FunctionType) -> ast.FunctionDef | None:
    """The definition in the tree of the whole file, so that line numbers are the file's; ``None`` without source."""
    try:
        lines, _ = inspect.findsource(function)
    except (OSError, TypeError):  # defined where no file can be read
        return None
    return _definitions("".join(lines)).get((function.__code__.co_name, function.__code__.co_firstlineno))


@functools.lru_cache(maxsize=64)
def _definitions(source: str) -> dict[tuple[str, int], ast.FunctionDef]:
    """All functions of a file by name and first line, which is that of the first decorator."""
    return {
        (node.name, min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])): node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    }


@functools.cache
def softmax_submodules(cls: type) -> frozenset[str]:
    """Names under which the constructors of a class keep an ``nn.Softmax``."""
    names: set[str] = set()
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        node = function_node(init) if isinstance(init, types.FunctionType) and base is not nn.Module else None
        for statement in ast.walk(node) if node else ():
            if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)):
                continue
            if isinstance(init, types.FunctionType) and resolve(statement.value.func, init) is nn.Softmax:
                names.update(target.attr for target in statement.targets if isinstance(target, ast.Attribute))
    return frozenset(names)


def resolve(node: ast.expr, function: types.FunctionType) -> Any:
    """What a dotted name means among the globals of a function; ``None`` where it is local or unknown."""
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, function)
        try:
            return None if owner is None else getattr(owner, node.attr, None)
        except Exception:  # such as torch.classes, whose lookup of an unknown name raises RuntimeError
            return None
    code = function.__code__
    if not isinstance(node, ast.Name) or node.id in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
        return None
    return function.__globals__.get(node.id)


def _may_contain(function: types.FunctionType, cls: type | None) -> bool:
    """A cheap look that spares most functions the parsing: the names that the compiled code mentions."""
    names = set(_names(function.__code__))
    if any(word in name for name in names for word in _WORDS) or (cls and names & softmax_submodules(cls)):
        return True
    return any(_is_helper(function.__globals__.get(name)) for name in names)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_helper(candidate: object) -> bool:
    return isinstance(candidate, types.FunctionType) and helper_kind(candidate) is not None


@functools.cache
def helper_kind(function: types.FunctionType) -> str | None:
    """``"softmax"`` for a function that returns the softmax of an argument, ``"attention"`` for one that attends."""
    if function.__module__.split(".")[0] == "torch" or not any("softmax" in n for n in _names(function.__code__)):
        return None
    reading = _Reading(function, None)
    if reading.attention_sites():
        return "attention"
    return "softmax" if reading.returned_sites() else None


def helper_sites(function: types.FunctionType) -> tuple[Site, ...]:
    """The calls to replace in a helper."""
    reading = _Reading(function, None)
    return reading.attention_sites() or reading.returned_sites()


class _Reading:
    """One function read: its softmax calls, and which names carry products or weights.

    The flow of values is followed without order: a name carries what any assignment to it could give.
    """

    def __init__(self, function: types.FunctionType, cls: type | None) -> None:
        self.function = function
        self.cls = cls
        node = function_node(function)
        self.nodes = list(ast.walk(node)) if node else []
        self.parameters = {n.arg for n in self.nodes if isinstance(n, ast.arg)}
        self.first = function.__code__.co_varnames[0] if function.__code__.co_argcount else None
        found = (self._site(n) for n in self.nodes if isinstance(n, ast.Call))
        self.found = [site for site in found if site is not None]

    def attention_sites(self) -> tuple[Site, ...]:
        if not self.found:
            return ()
        of_attention = self.cls is not None and _ATTENTION.search(self.cls.__name__)
        products = {id(n) for n in self.nodes if _is_product(n) or (of_attention and self._is_score_method(n))}
        from_product = self._carriers(products)
        returned = {id(n.value) for n in self.nodes if isinstance(n, ast.Return)} if of_attention else set()
        return tuple(
            site
            for site in self.found
            if site.kind == "attention"
            or (site.helper is not None and helper_kind(site.helper) == "attention")
            or id(site.node) in returned
            or (self._mentions(_scores(site), from_product, products) and self._weighs(site))
        )

    def _is_score_method(self, node: ast.AST) -> bool:
        """Whether a call looks like ``self.scores_of(query, key)``."""
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            return False
        owner = node.func.value
        return isinstance(owner, ast.Name) and owner.id == self.first and len(node.args) >= 2

    def returned_sites(self) -> tuple[Site, ...]:
        """The calls that give the softmax of an argument back to the caller."""
        arguments = self._carriers(set(), self.parameters)
        returns = [n.value for n in self.nodes if isinstance(n, ast.Return) and n.value is not None]

        def is_returned(site: Site) -> bool:
            source = {id(site.node)}
            carriers = self._carriers(source)
            return any(self._mentions(value, carriers, source) for value in returns)

        return tuple(s for s in self.found if self._mentions(_scores(s), arguments, set()) and is_returned(s))

    def _weighs(self, site: Site) -> bool:
        """Whether the result of the call goes into a matrix product."""
        source = {id(site.node)}
        carriers = self._carriers(source)
        return any(
            self._mentions(operand, carriers, source)
            for product in self.nodes
            if _is_product(product)
            for operand in ast.iter_child_nodes(product)
        )

    def _carriers(self, sources: set[int], names: set[str] | None = None) -> set[str]:
        """The names that may hold something made from the given expressions or names."""
        carriers = set(names or ())
        while True:
            before = len(carriers)
            for node in self.nodes:
                for target, value in _assignments(node):
                    if self._mentions(value, carriers, sources):
                        carriers |= set(_bound(target))
            if len(carriers) == before:
                return carriers

    def _mentions(self, node: ast.AST, names: set[str], sources: set[int]) -> bool:
        return any(id(n) in sources or (isinstance(n, ast.Name) and n.id in names) for n in ast.walk(node))

    def _site(self, call: ast.Call) -> Site | None:
        func = call.func
        meaning = resolve(func, self.function)
        if any(meaning is softmax for softmax in SOFTMAXES):
            return self._over_keys(call, "function")
        if meaning is nn.functional.scaled_dot_product_attention:
            return Site(call, "attention")
        if isinstance(meaning, types.FunctionType):
            return Site(call, "helper", meaning) if _is_helper(meaning) else None
        if isinstance(func, ast.Call) and resolve(func.func, self.function) is nn.Softmax:
            return self._over_keys(call, "constructor")
        if isinstance(func, ast.Attribute) and meaning is None:
            if isinstance(func.value, ast.Name) and func.value.id == self.first:
                owned = self.cls is not None and func.attr in softmax_submodules(self.cls)
                return Site(call, "submodule") if owned else None
            return self._over_keys(call, "tensor") if func.attr == "softmax" else None
        return None

    def _over_keys(self, call: ast.Call, kind: str) -> Site | None:
        """The call, unless it names another dimension than the last."""
        dim = dim_argument(call, kind)
        try:
            value = ast.literal_eval(dim) if dim is not None else None
        except ValueError:  # known at run time only
            return Site(call, kind)
        return Site(call, kind) if value in _LAST_DIMS else None


def dim_argument(call: ast.Call, kind: str) -> ast.expr | None:
    """The expression that says along which dimension a call takes its softmax."""
    if kind == "constructor":
        assert isinstance(call.func, ast.Call)
        call, position = call.func, 0
    else:
        position = 0 if kind == "tensor" else 1
    named = (keyword.value for keyword in call.keywords if keyword.arg == "dim")
    return next(named, call.args[position] if len(call.args) > position else None)


def _scores(site: Site) -> ast.AST:
    call = site.node
    if site.kind == "tensor":
        return call.func
    return call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "input"), call)


def _is_product(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.MatMult)
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return bool(_PRODUCT.search(name))


def _assignments(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    if isinstance(node, ast.Assign):
        yield from ((target, node.value) for target in node.targets)
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        yield node.target, node.value
    elif isinstance(node, (ast.For, ast.comprehension)):
        yield node.target, node.iter


def _bound(target: ast.AST) -> Iterator[str]:
    """The names that an assignment to ``target`` changes: ``x`` in ``x``, ``x[i]`` and ``(x, y)``, none in ``x.y``."""
    if isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, (ast.Subscript, ast.Starred)):
        yield from _bound(target.value)
    elif isinstance(target, (ast.Tuple, ast.List)):
        for element in target.elts:
            yield from _bound(element)
