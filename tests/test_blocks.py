"""Block by block: tensors of shards are the model's, a killed run ends with the same bits, damage is an error."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import conftest
from conftest import FAMILIES, OTHERS, Interrupt
from matquant.format.read import open_checkpoint
from matquant.hf_torch.layers import decoder_layers
from matquant.hf_torch.layerwise import embed, head_inputs, layer_output
from matquant.hf_torch.loading import load_float
from matquant.hf_torch.shards import open_shards
from matquant.system.errors import InputError

RUN: dict[str, Any] = {"method": "gptq", "samples": 8, "seq_len": 32, "batch_size": 4, "scope": "linears"}


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_vision"])
def test_shards_give_the_tensors_of_the_model(family: str, family_model: Callable[[str], Path]) -> None:
    shards, model = open_shards(family_model(family)), load_float(family_model(family))
    assert all(parameter.is_meta for parameter in shards.model.parameters())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, tensor in model.state_dict().items():
        if name not in tied:
            assert torch.equal(shards.read(name), tensor)
            assert shards.read(name).dtype == tensor.dtype


def test_a_model_in_many_shards_is_read_like_one_in_a_single_file(llama: Path, tmp_path: Path) -> None:
    model = load_float(llama)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    shards = open_shards(tmp_path)
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_safetensors_is_read_from_memory(llama: Path, tmp_path: Path) -> None:
    model = load_float(llama)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    shards = open_shards(tmp_path)
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"sweeps": 0}, pytest.param({"method": "omniquant", "steps": 1}, marks=pytest.mark.slow)]
)
def test_a_layer_whose_matrices_are_all_excluded_stays_float(
    options: dict[str, Any], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    run = {name: value for name, value in RUN.items() if name != "scope"} | {"exclude": [r"layers\.0\."]}
    out = conftest.quantize(llama, tmp_path / "out", text=[text_file], **run | options)
    state, quantised = open_shards(llama), open_checkpoint(out)
    assert not any("layers.0." in path for path in quantised.shapes)
    assert any("layers.1." in path for path in quantised.shapes)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(load_file(out / "model.safetensors")[name], state.read(name))


def test_a_shard_that_does_not_fit_is_an_error(llama: Path, tmp_path: Path) -> None:
    model = load_float(llama)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.norm.weight"] = torch.ones(3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"has mismatched keys: model\.norm\.weight; repair the model"):
        open_shards(tmp_path)


@pytest.mark.parametrize("family", [*FAMILIES, *(name for name in OTHERS if name != "bloom")])
def test_layers_called_one_after_the_other_are_the_model(family: str, family_model: Callable[[str], Path]) -> None:
    model = load_float(family_model(family), dtype=torch.float32)
    tokens = torch.randint(0, 250, (5, 40), generator=torch.Generator().manual_seed(0))  # longer than a sliding window
    batches, calls = embed(model, tokens.split(2))
    seen: list[torch.Tensor] = []
    given: list[torch.Tensor] = []
    _, last = decoder_layers(model)[-1]
    with torch.no_grad():
        handle = last.register_forward_hook(lambda module, args, output: seen.append(layer_output(output)))
        model(tokens)
        handle.remove()
        head = model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        model(tokens)
        handle.remove()
        for number, states in enumerate(batches):
            for (_, layer), call in zip(decoder_layers(model), calls, strict=True):
                states = call(layer, states)
            part = slice(2 * number, 2 * number + 2)
            torch.testing.assert_close(states, seen[0][part], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(head_inputs(model, tokens[part], states), given[0][part], rtol=1e-4, atol=1e-4)


def test_a_model_that_does_not_run_layer_by_layer_is_refused(
    family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """BLOOM gives its layers a bias for every sequence and head, and its configuration names no context."""
    bloom = family_model("bloom")
    with pytest.raises(
        InputError, match=r"^BloomForCausalLM does not support running one decoder layer .*; use --method qat or rtn"
    ):
        conftest.quantize(bloom, tmp_path / "out", text=[text_file], **RUN)
    conftest.quantize(bloom, tmp_path / "out", text=[text_file], steps=1, batch_size=2, seq_len=32)


@pytest.mark.parametrize(
    "family",
    ["llama", pytest.param("gemma2", marks=pytest.mark.slow), pytest.param("qwen3_moe", marks=pytest.mark.slow)],
)
def test_a_run_resumed_at_a_block_ends_with_the_same_bits(
    family: str, family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model = family_model(family)
    whole = conftest.quantize(model, tmp_path / "whole", text=[text_file], **RUN)
    with pytest.raises(KeyboardInterrupt):
        conftest.quantize(model, tmp_path / "killed", text=[text_file], report=Interrupt(print, 1), **RUN)
    assert not (tmp_path / "killed").exists()
    assert len(list((tmp_path / ".killed.work" / "blocks").iterdir())) == 1
    resumed = conftest.quantize(model, tmp_path / "killed", text=[text_file], resume=True, **RUN)
    for file in ("model.safetensors", "matquant_slices.safetensors"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
    assert not (tmp_path / ".killed.work").exists()


@pytest.mark.slow  # test_qat.py kills a run too, and runs that are interrupted resume here
def test_a_run_killed_from_outside_ends_with_the_same_bits(llama: Path, text_file: Path, tmp_path: Path) -> None:
    def command(*more: str) -> list[str]:
        options = ["--method", "gptq", "--samples", "8", "--seq-len", "32", "--scope", "linears", "--threads", "1"]
        options += ["--group-size", "channel"]
        where = [str(llama), "-o", str(tmp_path / "killed"), "--text", str(text_file)]
        return [sys.executable, "-m", "matquant", "quantize", *where, *options, *more]

    options: dict[str, Any] = {"method": "gptq", "samples": 8, "seq_len": 32, "scope": "linears", "threads": 1}
    conftest.quantize(str(llama), tmp_path / "whole", text=[text_file], **options)
    process = subprocess.Popen(command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    block = tmp_path / ".killed.work" / "blocks" / "00000.safetensors"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not block.is_file():
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if not (tmp_path / "killed").exists():
        subprocess.run(command("--resume"), check=True, capture_output=True)
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "killed")]
    assert files[0] == files[1]


def test_blocks_of_another_run_or_damaged_ones_are_refused(llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        conftest.quantize(llama, tmp_path / "out", text=[text_file], report=Interrupt(print, 1), **RUN)
    with pytest.raises(
        InputError, match=r"--resume needs seed=0 as in the interrupted run, found 1; use the same settings, or"
    ):
        conftest.quantize(llama, tmp_path / "out", text=[text_file], resume=True, seed=1, **RUN)
    block = tmp_path / ".out.work" / "blocks" / "00000.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(InputError, match=r"00000\.safetensors is damaged \(.*\); delete it to solve this block again"):
        conftest.quantize(llama, tmp_path / "out", text=[text_file], resume=True, **RUN)
    block.unlink()
    conftest.quantize(llama, tmp_path / "out", text=[text_file], resume=True, **RUN)


def test_a_broken_weight_stops_the_run_at_its_block(llama: Path, text_file: Path, tmp_path: Path) -> None:
    model = load_float(llama)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "broken" / name).write_bytes((llama / name).read_bytes())
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj has 1 NaN or infinite weights out of"):
        conftest.quantize(tmp_path / "broken", tmp_path / "out", text=[text_file], **RUN)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.work" / "blocks" / "00000.safetensors").is_file()
