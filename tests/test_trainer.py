"""The callback in a run of transformers' Trainer: schedules, logs, checkpoints, resumption, weight decay."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import gumbel_attention as ga
import models
from models import build

Config = ga.GumbelAttentionConfig
SCHEDULE = ga.temperature_schedule("exponential", 2.0, 0.1, steps=6)
STEPS = 8


@pytest.fixture(autouse=True)
def _one_quiet_process(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Tracker(hf.TrainerCallback):
    """Stands for a tracker's callback: keeps what it is given to log, and looks at each step's tau and noise."""

    def __init__(self):
        self.logged, self.taus, self.noises, self.evaluated = [], [], [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append({**logs, "step": state.global_step})

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.evaluated.append(ga.patch_of(model).tau[0].item())

    def watch(self, model):
        def look(module, inputs):
            state = next(module for module in model.modules() if hasattr(module, "noise_override"))
            if model.training:
                self.taus.append(state.tau.detach().flatten()[0].item())
                self.noises.append(state.noise(True))

        model.register_forward_pre_hook(look)


def _data(rows=8):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, models.VOCAB, (rows, 6), generator=generator)
    return [{"input_ids": row, "labels": row % 2} for row in ids]


def _trainer(model, folder, tracker=None, **settings):
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "dataloader_pin_memory": False,
        **settings,
    }
    args = hf.TrainingArguments(output_dir=str(folder), **settings)
    callbacks = [] if tracker is None else [tracker]
    return hf.Trainer(model=model, args=args, train_dataset=_data(), eval_dataset=_data(2), callbacks=callbacks)


def _patched(config=None):
    model = build("bert")
    ga.patch_model(model, config or Config(tau=2.0))
    return model


def _expected(steps):
    return [torch.tensor(SCHEDULE(step)).item() for step in steps]


def test_the_temperature_follows_the_schedule_in_steps_logs_and_evaluations(tmp_path):
    model, tracker = _patched(), Tracker()
    tracker.watch(model)
    trainer = _trainer(model, tmp_path, tracker, eval_strategy="steps", eval_steps=3)
    assert ga.GumbelAttentionCallback(tau=SCHEDULE).attach(trainer) is trainer.callback_handler.callbacks[0]
    trainer.train()
    assert tracker.taus == _expected(range(STEPS))
    assert tracker.evaluated == _expected([3, 6, STEPS])
    for history in (tracker.logged, trainer.state.log_history):
        logged = [(entry["step"], entry["tau"]) for entry in history if "loss" in entry]
        assert logged == [(step, SCHEDULE(step)) for step in range(1, STEPS + 1)]
        assert not any("tau" in entry for entry in history if "loss" not in entry)
    assert {tau.item() for tau in ga.patch_of(model).tau} == set(_expected([STEPS]))


def test_a_resumed_run_goes_on_where_the_other_was(tmp_path):
    whole = Tracker()
    model = _patched()
    trainer = _trainer(model, tmp_path, whole, save_strategy="steps", save_steps=3)
    ga.GumbelAttentionCallback(tau=SCHEDULE).attach(trainer)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-3" / "config.json").read_text())["gumbel_attention"]
    assert [group["tau"] for group in saved["groups"]] == _expected([3])
    restored = ga.patch_of(ga.from_pretrained(type(model), tmp_path / "checkpoint-3"))
    assert {tau.item() for tau in restored.tau} == set(_expected([3]))

    again, model = Tracker(), _patched(Config(tau=5.0))
    again.watch(model)
    trainer = _trainer(model, tmp_path, again)
    ga.GumbelAttentionCallback(tau=SCHEDULE).attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.taus == _expected(range(3, STEPS))
    wanted = [
        (entry["step"], entry["tau"], entry["loss"]) for entry in whole.logged if entry["step"] > 3 and "loss" in entry
    ]
    assert [(entry["step"], entry["tau"], entry["loss"]) for entry in again.logged if "loss" in entry] == wanted


def test_accumulated_gradients_share_one_temperature(tmp_path):
    model, tracker = _patched(), Tracker()
    tracker.watch(model)
    trainer = _trainer(model, tmp_path, tracker, gradient_accumulation_steps=2, max_steps=3)
    ga.GumbelAttentionCallback(tau=SCHEDULE).attach(trainer)
    trainer.train()
    assert tracker.taus == _expected([0, 0, 1, 1, 2, 2])


def test_the_best_model_gets_the_temperature_of_its_checkpoint(tmp_path):
    model = _patched()
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = _trainer(
        model, tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, **settings
    )
    ga.GumbelAttentionCallback(tau=SCHEDULE).attach(trainer)
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 6  # where the schedule has not come to its end
    assert {tau.item() for tau in ga.patch_of(model).tau} == set(_expected([best]))


def test_noise_follows_its_schedule_and_the_switch_is_put_back(tmp_path):
    model, tracker = _patched(), Tracker()
    tracker.watch(model)
    trainer = _trainer(model, tmp_path, tracker)
    ga.GumbelAttentionCallback(noise=lambda step: step < 3).attach(trainer)
    trainer.train()
    assert tracker.noises == ["gumbel"] * 3 + ["none"] * (STEPS - 3)
    assert [entry["noise"] for entry in tracker.logged if "loss" in entry] == [1.0, 1.0] + [0.0] * (STEPS - 2)
    assert {state.noise_override for state in model.modules() if hasattr(state, "noise_override")} == {None}


def test_as_a_plain_callback_it_does_all_but_reach_the_trackers(tmp_path):
    model, tracker = _patched(), Tracker()
    trainer = _trainer(model, tmp_path, tracker)
    trainer.add_callback(ga.GumbelAttentionCallback(tau=SCHEDULE))
    trainer.train()
    history = [entry["tau"] for entry in trainer.state.log_history if "loss" in entry]
    assert history == [SCHEDULE(step) for step in range(1, STEPS + 1)]
    assert not any("tau" in entry for entry in tracker.logged)


def test_learned_temperatures_are_logged_and_never_decayed(tmp_path):
    groups = [Config(learn_tau="head", layers=[0]), Config(learn_tau="scalar", layers=[1])]
    model, tracker = _patched(groups), Tracker()
    parameters = ga.patch_of(model).learned_tau_parameters()
    trainer = _trainer(model, tmp_path, tracker, weight_decay=0.5)
    ga.GumbelAttentionCallback().attach(trainer)
    trainer.train()
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert [decays[id(parameter)] for parameter in parameters] == [0.0, 0.0]
    assert decays[id(model.bert.encoder.layer[0].attention.self.query.weight)] == 0.5
    values = torch.cat(ga.patch_of(model).tau)
    last = [entry for entry in tracker.logged if "loss" in entry][-1]
    assert last["learned_tau_min"] == values.min().item()
    assert last["learned_tau_max"] == values.max().item()
    assert (values != 1.0).all()

    other = _patched(groups)
    trainer = _trainer(other, tmp_path, weight_decay=0.5)
    trainer.add_callback(ga.GumbelAttentionCallback())
    with pytest.raises(ValueError, match=r"decay learned temperatures by 0.5.*attach\(trainer\)"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_get_the_patch_into_each_checkpoint(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(_patched(), peft.LoraConfig(target_modules=["query"]))
    trainer = _trainer(adapted, tmp_path, save_strategy="steps", save_steps=4)
    ga.GumbelAttentionCallback(tau=SCHEDULE).attach(trainer)
    trainer.train()
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        assert (folder / "adapter_model.safetensors").exists()
        assert {tau.item() for tau in ga.load_patch(build("bert"), folder).tau} == set(_expected([step]))


def test_a_model_without_a_patch_is_refused(tmp_path):
    trainer = _trainer(build("bert"), tmp_path)
    with pytest.raises(ValueError, match="not patched"):
        ga.GumbelAttentionCallback(tau=SCHEDULE).attach(trainer)
    trainer.add_callback(ga.GumbelAttentionCallback(tau=SCHEDULE))
    with pytest.raises(ValueError, match="not patched"):
        trainer.train()


def test_a_schedule_that_is_none_is_refused():
    with pytest.raises(TypeError, match="tau must be None or a function"):
        ga.GumbelAttentionCallback(tau=0.5)
    with pytest.raises(TypeError, match="noise must be None or a function"):
        ga.GumbelAttentionCallback(noise=True)


def test_nothing_is_written_where_nothing_is_saved(tmp_path):
    trainer = _trainer(_patched(), tmp_path, max_steps=1)
    ga.GumbelAttentionCallback(tau=SCHEDULE).attach(trainer)
    trainer.train()
    assert not list(Path(tmp_path).glob("**/gumbel_attention*"))


def test_learned_temperatures_are_resumed_with_their_optimiser(tmp_path):
    groups = Config(learn_tau="head")
    whole = _patched(groups)
    trainer = _trainer(whole, tmp_path, save_strategy="steps", save_steps=3, weight_decay=0.5)
    ga.GumbelAttentionCallback().attach(trainer)
    trainer.train()
    again = _patched(groups)
    trainer = _trainer(again, tmp_path, weight_decay=0.5)
    ga.GumbelAttentionCallback().attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(one, two) for one, two in zip(ga.patch_of(whole).tau, ga.patch_of(again).tau, strict=True))
    assert not torch.equal(torch.cat(ga.patch_of(again).tau), torch.ones(2 * models.HEADS))


def test_the_noise_scale_follows_its_schedule_and_comes_back_from_a_checkpoint(tmp_path):
    loudness = ga.temperature_schedule("linear", 1.0, 0.2, steps=6)
    model, seen = _patched(), []
    state = next(module for module in model.modules() if hasattr(module, "noise_override"))
    model.register_forward_pre_hook(lambda module, inputs: seen.append(state.noise_scale.item()))
    tracker = Tracker()
    trainer = _trainer(model, tmp_path, tracker, save_strategy="steps", save_steps=3)
    ga.GumbelAttentionCallback(noise_scale=loudness).attach(trainer)
    trainer.train()
    assert seen == [torch.tensor(loudness(step)).item() for step in range(STEPS)]
    logged = [(entry["step"], entry["noise_scale"]) for entry in tracker.logged if "loss" in entry]
    assert logged == [(step, loudness(step)) for step in range(1, STEPS + 1)]
    checkpoint = tmp_path / "checkpoint-3"
    saved = json.loads((checkpoint / "config.json").read_text())["gumbel_attention"]
    assert [group["noise_scale"] for group in saved["groups"]] == [torch.tensor(loudness(3)).item()]
    loaded = ga.from_pretrained(type(model), checkpoint)
    scales = {module.noise_scale.item() for module in loaded.modules() if hasattr(module, "noise_override")}
    assert scales == {torch.tensor(loudness(3)).item()}


@pytest.mark.parametrize("kind", ["step", "clipped_exponential"])
def test_every_kind_of_schedule_goes_on_where_the_other_run_was(kind, tmp_path):
    timed = {"rate": 0.2, "every": 2} if kind == "clipped_exponential" else {"steps": 6}
    model = _patched()
    trainer = _trainer(model, tmp_path, save_strategy="steps", save_steps=3)
    ga.GumbelAttentionCallback(tau=ga.temperature_schedule(kind, 2.0, 0.5, **timed)).attach(trainer)
    trainer.train()
    again, model = Tracker(), _patched(Config(tau=5.0))
    again.watch(model)
    trainer = _trainer(model, tmp_path, again)
    schedule = ga.temperature_schedule(kind, 2.0, 0.5, **timed)  # made anew, as another process would
    ga.GumbelAttentionCallback(tau=schedule).attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.taus == [torch.tensor(schedule(step)).item() for step in range(3, STEPS)]


@pytest.fixture
def rank(request):
    """One process of two, whose collectives reach nobody."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    yield request.param
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 1], indirect=True)
def test_every_process_of_a_sharded_model_gathers_and_one_writes(rank, monkeypatch, tmp_path):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    gathered, whole = [], torch.arange(float(models.HEADS))
    monkeypatch.setattr(DTensor, "full_tensor", lambda self: gathered.append(self) or whole.clone())
    model = _patched(Config(learn_tau="head"))
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    states = [module for module in model.modules() if hasattr(module, "noise_override")]
    for state in states:
        state.log_tau = torch.nn.Parameter(distribute_tensor(state.log_tau.detach(), mesh, [Shard(0)]))
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=rank == 0)
    for step, config in ((4, False), (8, True)):
        folder = tmp_path / f"checkpoint-{step}"
        if rank == 0:  # the other process is on a machine that does not see the folder
            folder.mkdir()
            (folder / "pytorch_model_fsdp_0").mkdir()
            if config:
                (folder / "config.json").write_text("{}")
        gathered.clear()
        ga.GumbelAttentionCallback().on_save(args, hf.TrainerState(global_step=step), hf.TrainerControl(), model=model)
        assert len(gathered) == len(states)
        assert (folder / "gumbel_attention.json").exists() == (rank == 0 and not config)
    if rank == 0:
        learned = load_file(tmp_path / "checkpoint-4" / "gumbel_attention.safetensors")
        assert [torch.equal(value, whole) for value in learned.values()] == [True] * len(states)


class During(hf.TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


def _switches(model):
    return [module.noise_override for module in model.modules() if hasattr(module, "noise_override")]


def test_a_noise_switch_without_a_schedule_is_left_alone(tmp_path):
    model = _patched()
    trainer = _trainer(model, tmp_path, During(2, lambda: ga.patch_of(model).noise("normal")))
    ga.GumbelAttentionCallback(tau=SCHEDULE).attach(trainer)
    trainer.train()
    assert _switches(model) == ["normal", "normal"]


@pytest.mark.parametrize("noise", [None, lambda step: step < 3])
def test_layers_may_be_patched_during_training(noise, tmp_path):
    model = build("bert")
    ga.patch_model(model, Config(layers=[0])).noise("normal")
    trainer = _trainer(model, tmp_path, During(2, lambda: ga.patch_model(model, Config(layers=[1]))))
    ga.GumbelAttentionCallback(noise=noise).attach(trainer)
    trainer.train()
    assert _switches(model) == ["normal", None]
