"""The files in configs/accelerate/: Accelerate reads every one and understands every word of it."""

from __future__ import annotations

import argparse
import ipaddress
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
EXPECTED = {
    "cpu": (DistributedType.NO, 1, 1, "no"),
    "one_gpu": (DistributedType.NO, 1, 1, "bf16"),
    "several_gpus": (DistributedType.MULTI_GPU, 2, 1, "bf16"),
    "fsdp2": (DistributedType.FSDP, 2, 1, "bf16"),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 2, 1, "bf16"),
    "two_machines": (DistributedType.MULTI_GPU, 16, 2, "bf16"),
}
"""Engine, processes of all machines, machines, precision."""


def launched(name: str) -> argparse.Namespace:
    """What ``accelerate launch --config_file`` makes of a file."""
    args = launch_command_parser().parse_args(["--config_file", str(FILES[name]), "training/finetune.py"])
    with mock.patch.dict(os.environ), mock.patch("accelerate.commands.launch.is_bf16_available", return_value=True):
        parsed: argparse.Namespace = _validate_launch_command(args)[0]
    return parsed


def test_there_is_a_file_for_every_way_to_launch() -> None:
    assert sorted(EXPECTED) == sorted(FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_accelerate_reads_every_file(name: str) -> None:
    config = load_config_from_file(str(FILES[name]))  # refuses unknown keys
    engine, processes, machines, precision = EXPECTED[name]
    assert (config.distributed_type, config.num_processes, config.num_machines) == (engine, processes, machines)
    assert config.mixed_precision == precision
    assert config.use_cpu is (name == "cpu")
    assert (processes > 1) is (engine != DistributedType.NO), "one engine for many processes, none for one"
    assert processes % machines == 0
    assert 0 <= config.machine_rank < machines
    assert (config.main_process_ip is not None) is (machines > 1)
    args = launched(name)
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (processes, machines, precision)
    assert (args.use_fsdp, args.use_deepspeed) == (
        engine == DistributedType.FSDP,
        engine == DistributedType.DEEPSPEED,
    )
    assert args.multi_gpu is (engine == DistributedType.MULTI_GPU)


@pytest.mark.parametrize("name", sorted(FILES))
def test_accelerate_launch_knows_every_key(name: str) -> None:
    """Accelerate refuses unknown keys at the top of a file; those of an engine it passes on without a look."""
    known = vars(launch_command_parser().parse_args(["training/finetune.py"]))
    for engine, settings in yaml.safe_load(FILES[name].read_text()).items():
        for key in settings if isinstance(settings, dict) else ():
            assert key in known, f"{engine}.{key}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_file_says_how_it_is_used(name: str) -> None:
    comment = [line for line in FILES[name].read_text().splitlines() if line.startswith("#")]
    assert any(f"accelerate launch --config_file configs/accelerate/{name}.yaml" in line for line in comment)


def test_an_unknown_key_is_seen(tmp_path: Path) -> None:
    """The control: what these tests would not pass over."""
    broken = tmp_path / "broken.yaml"
    broken.write_text(FILES["fsdp2"].read_text() + "sharding: true\n")
    with pytest.raises(ValueError, match="unknown keys"):
        load_config_from_file(str(broken))
    assert "fsdp_sharding" not in vars(launch_command_parser().parse_args(["training/finetune.py"]))


def test_the_sharding_that_accelerate_builds_is_that_of_the_file() -> None:
    environment: dict[str, Any] = {
        key: value for key, value in prepare_multi_gpu_env(launched("fsdp2")).items() if key.startswith("FSDP_")
    }
    with mock.patch.dict(os.environ, environment):
        plugin = FullyShardedDataParallelPlugin(mixed_precision_policy="bf16")
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == ["BertLayer"]
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is False, "layers hold temperatures that are in no state_dict"
    assert str(plugin.mixed_precision_policy.param_dtype) == "torch.bfloat16"


def test_deepspeed_leaves_clipping_and_accumulation_to_the_script() -> None:
    config = load_config_from_file(str(FILES["deepspeed_zero2"]))
    assert config.deepspeed_config["zero_stage"] == 2
    assert not {"gradient_clipping", "gradient_accumulation_steps", "deepspeed_config_file"} & set(
        config.deepspeed_config
    )


def test_two_machines_meet_at_an_address_to_be_filled_in() -> None:
    config = load_config_from_file(str(FILES["two_machines"]))
    documentation = ipaddress.ip_network("192.0.2.0/24")  # RFC 5737: addresses that belong to nobody
    assert ipaddress.ip_address(config.main_process_ip) in documentation
    assert config.main_process_port == 29500
