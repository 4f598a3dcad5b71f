"""MLX: every slice in every width, block and rule, read back by the format's description; plans, dtypes, refusals."""

import errno
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import matquant
from exports import LLAMA, UNITS, nested_checkpoint, read_json, read_mlx, sliced, stored
from matquant.core.nest import slice_codes
from matquant.core.spec import Plan
from matquant.export import export
from matquant.format import shards as stream
from matquant.format.read import open_checkpoint
from matquant.format.shards import Part
from matquant.system.errors import InputError

SHAPES = {"model.layers.0.mlp.up_proj": (5, 256), "model.layers.0.mlp.gate_proj": (3, 192), "model.x": (4, 96)}
BLOCKS = {"model.layers.0.mlp.up_proj": 128, "model.layers.0.mlp.gate_proj": 64, "model.x": 32}
ODD = "model.layers.0.mlp.down_proj"


def container_bits(bits: int, rule: str) -> int:
    """The width MLX holds a slice in: it has none of 7 bits, and one code more needs one bit more."""
    needed = bits + (rule == "extra" and bits < 8)
    return 8 if needed == 7 else needed


def assert_weights(found: np.ndarray, expected: np.ndarray, codes: np.ndarray, dtype: Any) -> None:
    """Equal but for one rounding of the bias, which is at most the range of a row away from 0."""
    step = np.abs(expected).max(axis=1, keepdims=True) + np.ptp(expected, axis=1, keepdims=True)
    gap = (np.abs(found - expected) / step).max()
    if gap > UNITS[np.dtype(dtype)]:
        raise AssertionError(f"weights differ by {gap:.2e} of their row ({codes.max()} codes)")


@pytest.mark.parametrize("rule", ["prefix", "round", "extra"])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"group_size": 32}, {"own": False}])
def test_every_slice_is_held_exactly(rule: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = nested_checkpoint(tmp_path / "in", SHAPES, rule=rule, **options)
    checkpoint = open_checkpoint(source)
    for bits in (8, 7, 6, 5, 4, 3, 2, 1) if rule != "extra" else (7, 5, 4, 3, 2, 1):
        made = export(source, tmp_path / "out", to="mlx", bits=bits, overwrite=True)
        tensors, width = stored(tmp_path / "out"), container_bits(bits, rule)
        for path, (_, columns) in SHAPES.items():
            block = 32 if "group_size" in options else BLOCKS[path]
            codes, weight = read_mlx(tensors, path, width, block)
            np.testing.assert_array_equal(codes, slice_codes(checkpoint.nested(path).codes, bits, rule=rule))
            expected = sliced(checkpoint, path, bits)
            assert_weights(weight, expected, codes, np.float32)
            with pytest.raises(AssertionError, match="weights differ"):
                assert_weights(weight, sliced(checkpoint, path, bits - 1 or 2), codes, np.float32)
            assert weight.shape[1] == columns
        count = sum(rows * columns for rows, columns in SHAPES.values())
        bytes_ = sum(tensors[f"{path}.{part}"].nbytes for path in SHAPES for part in ("weight", "scales", "biases"))
        assert made["bits_per_weight"] == pytest.approx(8 * bytes_ / count)


def test_a_dtype_is_that_of_scales_and_of_all_else(tmp_path: Path) -> None:
    source = nested_checkpoint(tmp_path / "in", SHAPES)
    checkpoint = open_checkpoint(source)
    export(source, tmp_path / "out", to="mlx", bits=4, dtype="bfloat16")
    tensors = stored(tmp_path / "out")
    assert {str(array.dtype) for array in tensors.values()} == {"uint32", "bfloat16"}
    for path, block in BLOCKS.items():
        codes, weight = read_mlx(tensors, path, 4, block)
        assert_weights(weight, sliced(checkpoint, path, 4), codes, ml_dtypes.bfloat16)
        with pytest.raises(AssertionError, match="weights differ"):
            assert_weights(weight, sliced(checkpoint, path, 4), codes, np.float32)
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    export(source, tmp_path / "plain", to="mlx", bits=4)
    kinds = {name: str(array.dtype) for name, array in stored(tmp_path / "plain").items()}
    assert kinds["model.x.scales"] == kinds["model.x.biases"] == "float32"
    assert kinds["model.embed_tokens.weight"] == "bfloat16"


def test_zeros_of_round_slices_survive_two_bytes(tmp_path: Path) -> None:
    """Their biases are 2^(r-1) scales, so that no rounding is left."""
    source = nested_checkpoint(tmp_path / "in", SHAPES, rule="round", own=False)
    checkpoint = open_checkpoint(source)
    for dtype in ("bfloat16", "float16"):
        export(source, tmp_path / "out", to="mlx", bits=4, dtype=dtype, overwrite=True)
        for path, block in BLOCKS.items():
            _, weight = read_mlx(stored(tmp_path / "out"), path, 4, block)
            np.testing.assert_array_equal(weight, sliced(checkpoint, path, 4))


def test_a_plan_names_the_paths_that_differ(tmp_path: Path) -> None:
    source = nested_checkpoint(tmp_path / "in", {**SHAPES, ODD: (4, 172), "model.y": (4, 256), "model.z": (4, 256)})
    notices: list[str] = []
    plan = Plan(default=4, bits={"model.y": 7, ODD: 2})
    made = export(source, tmp_path / "out", to="mlx", plan=plan, notice=notices.append)
    assert notices == [f"1 weights such as {ODD} do not fit the blocks of mlx and stay dense (BF16)"]
    config = read_json(tmp_path / "out" / "config.json")
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"] == {
        **{"group_size": 128, "bits": 4, "mode": "affine"},
        "model.layers.0.mlp.gate_proj": {"group_size": 64, "bits": 4, "mode": "affine"},
        "model.x": {"group_size": 32, "bits": 4, "mode": "affine"},
        "model.y": {"group_size": 128, "bits": 8, "mode": "affine"},
    }
    assert made["containers"] == {"affine4-g128": 2, "affine4-g32": 1, "affine4-g64": 1, "affine8-g128": 1, "dense": 1}
    tensors, checkpoint = stored(tmp_path / "out"), open_checkpoint(source)
    np.testing.assert_array_equal(tensors[f"{ODD}.weight"], sliced(checkpoint, ODD, 2).astype(ml_dtypes.bfloat16))
    assert f"{ODD}.scales" not in tensors
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == b"a\n"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5}),
        ({"rope_theta": 5e5, **LLAMA3}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (None, {}),
    ],
)
def test_positions_are_where_mlx_lm_looks_for_them(parameters: Any, expected: dict[str, Any], tmp_path: Path) -> None:
    """It knows rope_parameters, as transformers 5 writes them, of few families, and takes its defaults else."""
    config = {**LLAMA, **({"rope_parameters": parameters} if parameters else {})}
    source = nested_checkpoint(tmp_path / "in", SHAPES, config=config)
    export(source, tmp_path / "out", to="mlx", bits=4)
    found = read_json(tmp_path / "out" / "config.json")
    assert {key: found[key] for key in ("rope_theta", "rope_scaling") if key in found} == expected
    kept = {**config, "model_type": "mistral", "rope_theta": 7.0}  # of an older transformers
    export(nested_checkpoint(tmp_path / "old", SHAPES, config=kept), tmp_path / "out2", to="mlx", bits=4)
    assert read_json(tmp_path / "out2" / "config.json")["rope_theta"] == 7.0


def test_sliding_windows_are_told(tmp_path: Path) -> None:
    for number, (more, told) in enumerate(
        [
            ({"model_type": "gemma2", "sliding_window": 4096}, ["gemma2"]),
            ({"model_type": "mistral", "sliding_window": 4096}, ["mistral"]),
            ({"model_type": "mistral", "sliding_window": None}, []),
            ({"model_type": "qwen2", "sliding_window": 4096, "layer_types": ["full_attention"]}, []),
            ({"model_type": "qwen2", "sliding_window": 4096, "layer_types": ["sliding_attention"]}, ["qwen2"]),
        ]
    ):
        source, notices = nested_checkpoint(tmp_path / f"in{number}", SHAPES, config={**LLAMA, **more}), list[str]()
        export(source, tmp_path / f"out{number}", to="mlx", bits=4, notice=notices.append)
        assert notices == [
            f"mlx_lm has no sliding window for {family}: beyond 4096 tokens it computes another model"
            for family in told
        ]


LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"rope_parameters": LONG}, "rotary positions of type 'longrope'"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rotary positions of type 'su'"),
        (
            {"model_type": "gemma2", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rotary positions of type 'linear'",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
        ({"rope_parameters": YARN | {"attention_factor": 1.5}}, "yarn positions with attention_factor"),
        ({"rope_parameters": YARN | {"truncate": False}}, "yarn positions with attention_factor"),
        ({"rope_parameters": YARN | {"mscale_all_dim": 1.0}}, "yarn positions with attention_factor"),
        ({"hidden_act": "gelu"}, "the activation 'gelu'"),
        ({"model_type": "gemma2", "hidden_activation": "silu"}, "the activation 'silu'"),
        ({"model_type": "gemma2", "attn_logit_softcapping": None}, "attention or logits without a soft cap"),
        ({"model_type": "gemma2", "tie_word_embeddings": False}, "an untied head"),
        ({"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}, "head_dim 32"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 8}, "sliding windows"),
        ({"rope_traditional": True}, "rope_traditional"),
    ],
)
def test_what_mlx_lm_computes_differently_is_rejected(more: dict[str, Any], problem: str, tmp_path: Path) -> None:
    source = nested_checkpoint(tmp_path / "in", SHAPES, config={**LLAMA, **more})
    with pytest.raises(InputError, match=f"--to mlx does not support {problem}") as caught:
        export(source, tmp_path / "out", to="mlx", bits=4)
    assert str(caught.value).endswith("computes something else; use --to dense, or --to compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_biases_that_mlx_lm_does_not_read_are_rejected(tmp_path: Path) -> None:
    bias = {f"{ODD}.bias": np.zeros(4, np.float32)}
    for number, (family, holds) in enumerate([("llama", True), ("mistral", False), ("qwen3", False)]):
        config = {**LLAMA, "model_type": family}
        source = nested_checkpoint(tmp_path / f"in{number}", SHAPES, config=config, plain=bias)
        if holds:
            export(source, tmp_path / "out", to="mlx", bits=4)
        else:
            with pytest.raises(InputError, match=f"does not support biases such as {ODD}.bias"):
                export(source, tmp_path / "other", to="mlx", bits=4)


def test_yarn_and_dynamic_positions_are_written_out_or_noted(tmp_path: Path) -> None:
    notices: list[str] = []
    config = {**LLAMA, "max_position_embeddings": 256}
    source = nested_checkpoint(tmp_path / "in", SHAPES, config={**config, "rope_parameters": YARN})
    export(source, tmp_path / "out", to="mlx", bits=4, notice=notices.append)
    found = read_json(tmp_path / "out" / "config.json")["rope_scaling"]
    assert (found, notices) == ({**YARN, "original_max_position_embeddings": 256}, [])
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    source = nested_checkpoint(tmp_path / "dynamic", SHAPES, config={**config, "rope_parameters": dynamic})
    export(source, tmp_path / "out2", to="mlx", bits=4, notice=notices.append)
    (notice,) = notices
    assert notice.endswith("beyond 256 tokens it computes another model")


def test_weights_of_no_block_at_all_make_a_dense_model(tmp_path: Path) -> None:
    source = nested_checkpoint(tmp_path / "in", {ODD: (4, 172)})
    made = export(source, tmp_path / "out", to="mlx", bits=2)
    assert made["containers"] == {"dense": 1}
    assert "quantization" not in read_json(tmp_path / "out" / "config.json")


def test_what_mlx_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = nested_checkpoint(tmp_path / "in", {"model.x": (4, 192)}, group_size=48)
    with pytest.raises(InputError) as caught:
        export(source, tmp_path / "out", to="mlx", bits=4)
    assert str(caught.value).startswith(
        "--to mlx cannot hold model.x at 4 bits, rule prefix, exactly (1 of 1 weights): "
        "groups of 48 are not multiples of 32; use --to dense"
    )
    source = nested_checkpoint(tmp_path / "extra", SHAPES, rule="extra")
    export(source, tmp_path / "out", to="mlx", bits=8)
    opt = nested_checkpoint(tmp_path / "opt", SHAPES, config={"model_type": "opt"})
    with pytest.raises(InputError) as caught:
        export(opt, tmp_path / "other", to="mlx", bits=4)
    assert str(caught.value).startswith(
        "--to mlx does not support opt models, only llama, mistral, qwen2, qwen3, gemma2; use --to compressed-tensors"
    )
    assert not (tmp_path / "other").exists()
    with pytest.raises(matquant.InputError, match="out exists; use another"):
        export(source, tmp_path / "out", to="mlx", bits=4)


def test_a_disk_that_fills_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, made = nested_checkpoint(tmp_path / "in", SHAPES), stream.made

    def fills(parts: Iterable[Part]) -> Iterator[Any]:
        for number, part in enumerate(made(parts)):
            if number == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield part

    monkeypatch.setattr(stream, "made", fills)
    with pytest.raises(InputError, match="out was not written: no space left on the device"):
        export(source, tmp_path / "out", to="mlx", bits=4)
    assert [item.name for item in tmp_path.iterdir()] == ["in"]
