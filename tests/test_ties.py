"""The output head and the embedding: tied or not is decided once, as transformers has it, and everyone serves that."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import conftest
import matquant
from conftest import SMALL, make_tokenizer
from matquant.hf_torch.loading import load_float
from matquant.hf_torch.shards import open_shards
from matquant.system.errors import InputError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = [1, 5, 9, 2, 7]
METHODS: dict[str, dict[str, Any]] = {"rtn": {}, "gptq": {"samples": 4, "seq_len": 16}}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose embedding is its head."""
    directory = tmp_path_factory.mktemp("tied") / "model"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(
        directory
    )
    make_tokenizer().save_pretrained(directory)
    return directory


def changed(tied: Path, where: Path, change: Callable[[Tensors], Any], **config: Any) -> Path:
    """A copy of the model with other tensors and configuration."""
    copy = shutil.copytree(tied, where)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, **config}))
    return copy


def add_head(tensors: Tensors) -> None:
    tensors[HEAD] = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(1))


def move_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.tensor([TOKENS])).logits
    return out


@pytest.mark.parametrize("method", METHODS)
def test_a_stored_head_that_differs_from_tied_embeddings_is_served_everywhere(
    method: str, tied: Path, tmp_path: Path, text_file: Path
) -> None:
    source = changed(tied, tmp_path / "model", add_head)
    out = conftest.quantize(source, tmp_path / "out", method=method, text=[text_file], **METHODS[method])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    stored = load_file(source / "model.safetensors")[HEAD]
    assert np.array_equal(matquant.open_checkpoint(out).array(HEAD), stored.numpy())
    served = logits(matquant.load(out, kernels="none"))
    stock = transformers.AutoModelForCausalLM.from_pretrained(source)  # keeps the two apart, with a warning
    assert (logits(stock) - served).abs().max() < 0.1 * served.std()
    engine = matquant.Engine(out, activations="float").score(TOKENS)
    wanted = served[0].log_softmax(-1)[range(len(TOKENS) - 1), TOKENS[1:]]
    assert np.allclose(np.asarray(engine)[-len(wanted) :], wanted.numpy(), atol=1e-3)


def test_the_streamed_and_the_whole_model_decide_alike(tied: Path, tmp_path: Path) -> None:
    def copy_head(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()

    for number, (change, is_tied) in enumerate(((add_head, False), (copy_head, True), (move_head, True))):
        source = changed(tied, tmp_path / str(number), change)
        whole, streamed = load_float(source), open_shards(source)
        for model in (whole, streamed.model):
            assert model.config.tie_word_embeddings is is_tied
            assert (HEAD in model.all_tied_weights_keys) is is_tied
        for name in {EMBEDDING, HEAD} if not is_tied else {EMBEDDING}:
            assert torch.equal(streamed.read(name), whole.state_dict()[name])


def test_a_head_alone_is_the_embedding_too(tied: Path, tmp_path: Path) -> None:
    source = changed(tied, tmp_path / "model", move_head)
    out = conftest.quantize(source, tmp_path / "out", method="rtn")
    checkpoint = matquant.open_checkpoint(out)
    assert checkpoint.config["tie_word_embeddings"] is True
    assert HEAD not in checkpoint.files
    assert np.array_equal(checkpoint.array(EMBEDDING), load_file(source / "model.safetensors")[HEAD].numpy())


def test_a_head_that_is_neither_stored_nor_tied_is_rejected_with_what_to_add(tied: Path, tmp_path: Path) -> None:
    source = changed(tied, tmp_path / "model", lambda tensors: None, tie_word_embeddings=False)
    for read in (load_float, open_shards):
        with pytest.raises(
            InputError, match=re.escape(f'missing keys: {HEAD}; add it, or "tie_word_embeddings": true')
        ):
            read(source)


def test_a_checkpoint_that_stores_a_head_is_opened_as_untied(tied: Path, tmp_path: Path) -> None:
    out = conftest.quantize(changed(tied, tmp_path / "model", add_head), tmp_path / "out", method="rtn")
    config = json.loads((out / "config.json").read_text())
    nested = {**config, "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}
    (out / "config.json").write_text(json.dumps(nested))
    opened = matquant.open_checkpoint(out, check_hashes=False).config
    assert opened["tie_word_embeddings"] is opened["text_config"]["tie_word_embeddings"] is False


# Tensors that no class uses -------------------------------------------------------------------------------------------


def extra(*names: str, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.ones(4, 4, dtype=dtype) for name in names})


LAYER = "model.layers.0.self_attn"
UNUSED = {
    "head": (("score.weight",), "a classification, reward or value head: score.weight; give the language model"),
    "layers": (("model.layers.2.mlp.up_proj.weight",), "layers beyond the 2 of config.json"),
    "biases": ((f"{LAYER}.q_proj.bias",), "biases that config.json does not mention"),
    "scales": ((f"{LAYER}.q_proj.weight_scale",), "scales of weights that another tool has quantised"),
    "vision": (("vision_tower.patch.weight",), "parts that read images or sound"),
    "several": (tuple(f"x.{i}.weight" for i in range(5)), "has tensors (5) that LlamaForCausalLM does not use"),
    "others": (tuple(f"x.{i}.weight" for i in range(5)), "x.0.weight, x.1.weight, x.2.weight and 2 more"),
}


@pytest.mark.parametrize("name", UNUSED)
def test_tensors_that_would_be_dropped_are_rejected_by_kind_however_the_model_is_read(
    name: str, tied: Path, tmp_path: Path
) -> None:
    names, part = UNUSED[name]
    source = changed(tied, tmp_path / "model", extra(*names))
    messages = []
    for read in (load_float, open_shards):
        with pytest.raises(InputError, match=re.escape(part)) as caught:
            read(source)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_buffers_and_heads_that_predict_further_tokens_are_left_out(tied: Path, tmp_path: Path) -> None:
    names = (f"{LAYER}.rotary_emb.inv_freq", f"{LAYER}.masked_bias".replace("self_attn", "attention"), "mtp.fc.weight")
    more = ("model.layers.2.mlp.up_proj.weight",)
    source = changed(tied, tmp_path / "model", extra(*names, *more), num_nextn_predict_layers=1)
    for read in (load_float, open_shards):
        read(source)


def test_integer_weights_in_a_pickled_file_are_rejected(tied: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tied, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{LAYER}.q_proj.weight"] = tensors[f"{LAYER}.q_proj.weight"].to(torch.int8)
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    for read in (load_float, open_shards):
        with pytest.raises(InputError, match=r"stores weights as torch\.int8"):
            read(source)
