"""Embedding and head as nested weights: format 5, stock readers, the engine, loading, plans and exports."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import conftest
import matquant
import oracle
from conftest import FAMILIES
from matquant.core.nest import COMPANDED, RULES, UNIFORM
from matquant.core.planes import load_weight, rows_at
from matquant.core.spec import Plan, Spec
from matquant.core.tensor import NestedTensor
from matquant.export import export, make_job
from matquant.format.contents import summarise
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.format.verify import verify_checkpoint
from matquant.format.write import write_checkpoint
from matquant.methods.parts.ends import ROWS, nest_in_parts
from matquant.methods.parts.fake import Grid, nest
from matquant.planning.budget import bits_budget
from matquant.planning.run import make_plan
from matquant.planning.sensitivity import open_losses
from matquant.system.errors import InputError
from test_checkpoint import DOCUMENT, document_json, document_tables, example_rows, read_all

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
PAGE = "Embedding and head: format 5"
TOKENS = torch.arange(3, 60).reshape(3, 19)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(tied, dtype) -> a tiny llama."""
    root = tmp_path_factory.mktemp("sources")

    def get(*, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
        directory = root / f"{tied}-{str(dtype).removeprefix('torch.')}"
        if not directory.is_dir():
            torch.manual_seed(1)
            config = FAMILIES["llama"]()
            config.tie_word_embeddings, config.intermediate_size = tied, 64
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(4.0)
            model.to(dtype).save_pretrained(directory)
            conftest.make_tokenizer().save_pretrained(directory)
        return directory

    return get


@pytest.fixture(scope="module")
def checkpoint(source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(tied, dtype, options) -> its checkpoint by rounding, in groups of 16."""
    root = tmp_path_factory.mktemp("nested")

    def get(*, tied: bool, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        out = root / "-".join([str(tied), str(dtype), *map(str, options.values())])
        if not out.is_dir():
            asked = {"method": "rtn", "scope": "all", "group_size": 16, **options}
            matquant.quantize(source(tied=tied, dtype=dtype), out, **asked)
        return out

    return get


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


# ----------------------------------------------------------------------------------------------------------- on disk


def example(config_dtype: str, directory: Path) -> Path:
    """The example of the format page as a checkpoint."""
    rows = example_rows()
    zero, own = np.full((2, 1), 128, np.float32), ("scale_2", "zero_2")
    tensor = NestedTensor(
        codes=np.array([row["codes"] for row in rows], np.uint8),
        scale=np.array([[row["scale"]] for row in rows], np.float32),
        zero=zero,
        rule="prefix",
        slices={2: tuple(np.array([[row[key]] for row in rows], np.float32) for key in own)},
    )
    config = {"model_type": "llama", "tie_word_embeddings": True, "dtype": config_dtype}
    spec = Spec.from_json(document_json(PAGE)["matquant"], where="the document")
    write_checkpoint(directory, [(EMBEDDING, tensor)], spec=spec, config=config, ignore=[HEAD], files={})
    return directory


def test_the_example_of_the_format_page_is_what_is_written(tmp_path: Path) -> None:
    out = example("float32", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["quantization_config"] == document_json(PAGE)
    shown = [row["bytes"] for row in document_tables(PAGE)[0]]
    half = read_all(example("bfloat16", tmp_path / "half"))[f"{EMBEDDING}.weight_scale"]
    tensors = read_all(out)
    packed, scale = (tensors[f"{EMBEDDING}.weight_{part}"] for part in ("packed", "scale"))
    assert [packed.data.hex(" "), scale.data.hex(" "), half.data.hex(" ")] == shown
    assert (scale.dtype, half.dtype) == ("F32", "BF16")
    found = verify_checkpoint(out)
    read = found.nested(EMBEDDING).read(found.widths(2)[EMBEDDING])
    (values,) = document_tables(PAGE)[1]
    assert read.tolist() == [[float(value) for value in values[row].split()] for row in ("row 0", "row 1")]


def test_a_record_without_a_quantised_head_stays_in_its_old_format() -> None:
    assert Spec(rule="prefix", widths=()).format == 1
    assert "head_bits" not in Spec(rule="prefix", widths=(), grid=COMPANDED).to_json()
    assert re.search(r"formats 1 to 6", DOCUMENT.read_text())
    with pytest.raises(InputError, match="'head_bits', which format 4 does not have"):
        Spec.from_json({"format": 4, "rule": "prefix", "widths": [], "head_bits": 6}, where="x")
    with pytest.raises(InputError, match=re.escape("head_bits=9, which must be null or an integer 1..8")):
        Spec.from_json({"format": 5, "rule": "prefix", "widths": [], "head_bits": 9}, where="x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grid", [UNIFORM, COMPANDED])
def test_stock_transformers_reads_the_8_bit_model(
    grid: str, tied: bool, dtype: torch.dtype, checkpoint: Callable[..., Path]
) -> None:
    out = checkpoint(tied=tied, dtype=dtype, grid=grid)
    stock = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    ours = matquant.load(out, bits=8, kernels="none", dtype=dtype)
    assert torch.equal(logits(stock), logits(ours))
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) == tied
    ours.set_bits(2)
    assert not torch.equal(logits(stock), logits(ours))


SHORT: dict[str, dict[str, Any]] = {
    "rtn": {"affine": "refit"},
    "gptq": {"samples": 8, "seq_len": 32},
    "omniquant": {"samples": 8, "seq_len": 32, "steps": 1},
    "qat": {"steps": 1, "seq_len": 32},
    "distill": {"samples": 8, "seq_len": 32, "steps": 2, "tune": 0},
}


@pytest.fixture(scope="module")
def quantised(
    source: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Checkpoint]:
    """(method, tied) -> the checkpoint of a short run, in groups of 16."""
    root = tmp_path_factory.mktemp("methods")

    def get(method: str, *, tied: bool = False) -> Checkpoint:
        out = root / f"{method}-{tied}"
        if not out.is_dir():
            text = {} if method == "rtn" else {"text": [text_file]}
            asked = {"scope": "all", "group_size": 16, "zero_point": "midrange", "head_bits": 5}
            matquant.quantize(source(tied=tied), out, method=method, **asked, **SHORT[method], **text)
        return open_checkpoint(out)

    return get


def weight_of(source: Path, path: str) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return model.get_parameter(f"{path}.weight").detach()


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow if m == "distill" else []) for m in SHORT])
def test_what_is_not_calibrated_is_rounded_alike_by_every_method(
    method: str, source: Callable[..., Path], quantised: Callable[..., Checkpoint]
) -> None:
    found, grid = quantised(method), Grid(rule="prefix", group_size=16, zeros="centre", sliced=(2, 3, 4))
    assert sorted(found.ends) == [HEAD, EMBEDDING]
    assert found.spec.head_bits == 5
    for path in found.ends:
        expected, nested = nest(weight_of(source(tied=False), path), grid), found.nested(path)
        calibrated = path == HEAD and method in ("gptq", "distill")
        assert np.array_equal(nested.codes, expected.codes.numpy()) != calibrated, path
        assert np.array_equal(nested.slices[2][0], expected.slices[2][0].numpy()) != calibrated, path


def test_distillation_keeps_the_head_of_its_first_stage(quantised: Callable[..., Checkpoint]) -> None:
    first, last = (quantised(method).nested(HEAD) for method in ("gptq", "distill"))
    assert np.array_equal(first.codes, last.codes)
    assert all(np.array_equal(first.slices[bits][0], last.slices[bits][0]) for bits in (2, 3, 4))
    changed = "model.layers.0.mlp.down_proj"
    assert not np.array_equal(*(quantised(method).nested(changed).codes for method in ("gptq", "distill")))


@pytest.mark.parametrize("at", [pytest.param("calibrating", marks=pytest.mark.slow), "the head"])
def test_a_run_stopped_at_the_head_resumes_to_the_same_bits(
    at: str, source: Callable[..., Path], quantised: Callable[..., Checkpoint], text_file: Path, tmp_path: Path
) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record.get("notice", "").startswith(at) or record.get("block") == at:
            raise KeyboardInterrupt

    asked = {"method": "gptq", "group_size": 16, "zero_point": "midrange", "head_bits": 5, **SHORT["gptq"]}
    with pytest.raises(KeyboardInterrupt):
        matquant.quantize(source(tied=True), tmp_path / "out", text=[text_file], report=stop, **asked)
    assert (tmp_path / ".out.work" / "blocks" / "ends.safetensors").exists() == (at == "the head")
    out = matquant.quantize(source(tied=True), tmp_path / "out", text=[text_file], resume=True, **asked)
    assert read_all(out) == read_all(quantised("gptq", tied=True).directory)


@pytest.mark.parametrize("tied", [True, False])
def test_a_calibrated_head_has_less_output_error_than_a_rounded_one(
    tied: bool, source: Callable[..., Path], quantised: Callable[..., Checkpoint], text_file: Path
) -> None:
    """The inputs are those that transformers gives to the head of the float model."""
    path = EMBEDDING if tied else HEAD
    model = transformers.AutoModelForCausalLM.from_pretrained(source(tied=tied), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source(tied=tied))
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"][:1920]).reshape(30, 64)
    inputs: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    weight = model.lm_head.weight.detach()

    def errors(method: str) -> dict[int, float]:
        nested = quantised(method, tied=tied).nested(path)
        return {
            bits: float((inputs[0] @ (weight - torch.from_numpy(nested.read(bits))).T).square().sum())
            for bits in (6, 4, 3, 2)
        }

    rounded, calibrated = errors("rtn"), errors("gptq")
    assert all(calibrated[bits] < 0.9 * rounded[bits] for bits in rounded), (calibrated, rounded)
    assert (HEAD in quantised("gptq", tied=tied).shapes) != tied


def test_rows_encoded_in_parts_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    weight, grid = torch.randn(ROWS + 5, 32), Grid(rule="prefix", group_size=16, sliced=(2,))
    whole, parts = nest(weight, grid), nest_in_parts(weight, grid, name="x")
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)
    assert all(torch.equal(a, b) for a, b in zip(whole.slices[2], parts.slices[2], strict=True))


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"scope": "linears"}, ()),
        ({"scope": "ffn"}, ()),
        ({"exclude": ["lm_head"]}, (EMBEDDING,)),
        ({"baseline_bits": 8}, ()),
    ],
    ids=["linears", "ffn", "excluded", "dedicated"],
)
def test_what_the_scope_leaves_out_stays_float(
    options: dict[str, Any], ends: tuple[str, ...], checkpoint: Callable[..., Path]
) -> None:
    found = open_checkpoint(checkpoint(tied=False, **options))
    assert found.ends == ends
    assert (found.spec.head_bits is not None) == bool(ends)
    assert all(name in found.files for name in {f"{HEAD}.weight"} if HEAD not in ends)


# ------------------------------------------------------------------------------------------------------------- widths


def test_a_plan_names_the_head_or_it_keeps_its_least_width(checkpoint: Callable[..., Path]) -> None:
    found = open_checkpoint(checkpoint(tied=False, head_bits=5))
    body = next(path for path in found.shapes if path not in found.ends)
    for bits in range(1, 9):
        assert found.widths(bits) == {path: max(bits, 5) if path in found.ends else bits for path in found.shapes}
    named = found.widths(Plan(default=2, bits={HEAD: 3, body: 4}))
    assert (named[HEAD], named[EMBEDDING], named[body]) == (3, 5, 4)
    listed = Plan(default=None, bits={path: 4 for path in found.shapes if path not in found.ends})
    assert found.widths(listed)[HEAD] == 5
    with pytest.raises(InputError, match="no default and misses"):
        found.widths(Plan(default=None, bits={HEAD: 4}))


def test_bits_per_weight_count_the_head_at_the_width_it_is_read(checkpoint: Callable[..., Path]) -> None:
    found = open_checkpoint(checkpoint(tied=True, zero_point="midrange", affine="refit"))
    sizes = {path: rows * columns for path, (rows, columns) in found.shapes.items()}
    groups = {path: count // 16 for path, count in sizes.items()}
    own = 2  # bytes of a scale
    body = sum(sizes[p] * 2 / 8 + groups[p] * own + 16 for p in sizes if p not in found.ends)
    ends = sum(sizes[p] * 6 / 8 + groups[p] * 4 + 16 for p in found.ends)  # the 8-bit scale, float32
    assert summarise(found)["widths"][2]["bits_per_weight"] == pytest.approx(
        8 * (body + ends) / sum(sizes.values()), rel=1e-12
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", [UNIFORM, COMPANDED])
def test_rows_are_those_of_the_oracle_for_every_code_and_width(rule: str, grid: str) -> None:
    if grid == COMPANDED and rule != "prefix":
        pytest.skip("the companded grid needs the rule prefix")
    generator = np.random.default_rng(0)
    for rows, columns, groups in ((256, 1, 1), (19, 100, 2), (17, 96, 3), (3, 33, 1)):
        codes = generator.integers(0, 256, (rows, columns), dtype=np.uint8)
        if columns == 1:
            codes[:, 0] = np.arange(256)
        scale = (2.0 ** generator.integers(-8, -4, (rows, groups))).astype(np.float32)
        zero = generator.integers(100, 150, (rows, groups)).astype(np.float32) if grid == UNIFORM else scale * 0 + 128
        own = ((scale * 64 * 1.25).astype(np.float32), np.full((rows, groups), 1.5, np.float32))
        tensor = NestedTensor(codes=codes, scale=scale, zero=zero, rule=rule, slices={2: own}, grid=grid)
        weight = load_weight(tensor)
        ids = generator.permutation(rows).astype(np.int64)
        for bits in range(1, 9):
            out = np.empty((rows, columns), np.float32)
            rows_at(weight, ids.ctypes.data, out.ctypes.data, count=rows, bits=bits)
            assert np.array_equal(out, tensor.read(bits)[ids]), (rows, columns, bits)
            if grid == COMPANDED and columns == 1 and bits != 2:
                step = 2 ** (8 - bits)
                positions = [oracle.companded_position(int(code) >> (8 - bits), bits) for code in codes[ids, 0]]
                expected = [float(p) * step + (step - 1) / 2 - 128 for p in positions]
                assert (out[:, 0] / scale[ids, 0]).tolist() == expected


def test_a_row_outside_the_vocabulary_is_refused(checkpoint: Callable[..., Path]) -> None:
    model = matquant.load(checkpoint(tied=True), bits=4)
    for wrong in (-1, 300):
        with pytest.raises(InputError, match="token ids must be from 0 to 299"):
            model(torch.tensor([[wrong]]))


# ------------------------------------------------------------------------------------------------- serving and loading


@pytest.mark.parametrize("grid", [UNIFORM, COMPANDED])
@pytest.mark.parametrize("tied", [True, False])
def test_the_engine_and_the_kernels_equal_the_dense_model(
    tied: bool, grid: str, checkpoint: Callable[..., Path]
) -> None:
    out = checkpoint(tied=tied, grid=grid)
    dense = matquant.load(out, kernels="none")
    kernels = matquant.load(out, kernels="float")
    engine = matquant.Engine(out, activations="float", threads=1)
    ids = TOKENS[0].tolist()
    for bits in (8, 7, 6, 5, 4, 3, 2):
        for plan in (None, {EMBEDDING: 4}):
            dense.set_bits(bits, plan=plan)
            kernels.set_bits(bits, plan=plan)
            expected = logits(dense)[0].numpy()
            found = engine.session().extend(
                ids, engine.widths(plan=Plan(default=bits, bits=plan or {})), all_logits=True
            )
            reach = np.abs(expected).max()
            assert np.abs(found - expected).max() < 1e-5 * reach, (bits, plan)
            assert np.abs(logits(kernels)[0].numpy() - expected).max() < 1e-5 * reach, (bits, plan)
    state = kernels.state_dict()
    assert torch.equal(state[f"{EMBEDDING}.weight"], dense.state_dict()[f"{EMBEDDING}.weight"])


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen3", "opt", "gpt_neox", "phi3"])
def test_families_with_scaled_or_other_embeddings(
    family: str, family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = matquant.quantize(family_model(family), tmp_path / "out", method="rtn", group_size=16)
    checkpoint = open_checkpoint(out)
    assert checkpoint.ends
    stock = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    dense = matquant.load(out, bits=8, kernels="none", dtype=torch.float32)
    assert torch.equal(logits(stock), logits(dense))
    kernels = matquant.load(out, bits=3, dtype=torch.float32)
    assert kernels.kernels.endswith("float activations")
    dense.set_bits(3)
    expected = logits(dense)
    assert (logits(kernels) - expected).abs().max() < 1e-5 * expected.abs().max()
    if family in ("gemma2", "gemma3", "qwen3"):
        engine = matquant.Engine(out, activations="float", threads=1)
        found = engine.session().extend(TOKENS[0].tolist(), engine.widths(3), all_logits=True)
        assert np.abs(found - expected[0].numpy()).max() < 2e-5 * float(expected.abs().max())


def test_an_engine_with_few_planes_keeps_those_that_the_head_needs(checkpoint: Callable[..., Path]) -> None:
    out = checkpoint(tied=True)
    small, whole = (matquant.Engine(out, max_bits=bits, threads=1) for bits in (2, 8))
    ids = TOKENS[0].tolist()
    expected = whole.session().extend(ids, whole.widths(2)).copy()
    assert np.array_equal(small.session().extend(ids, small.widths(2)), expected)
    with pytest.raises(InputError, match=f"bits=8 for {EMBEDDING} exceeds max_bits=2"):
        small.widths(plan=Plan(default=2, bits={EMBEDDING: 8}))
    weights = {path: weight.planes.resident_bits for path, weight in small.model.weights.items()}
    assert weights.pop(EMBEDDING) == 6
    assert set(weights.values()) == {2}


def test_a_token_reads_one_row_of_an_embedding_that_is_not_the_head(checkpoint: Callable[..., Path]) -> None:
    tied, untied = (matquant.Engine(checkpoint(tied=t), threads=1) for t in (True, False))
    assert tied.model.bytes_per_token(tied.widths(4)) == untied.model.bytes_per_token(untied.widths(4))


def test_a_saved_model_is_the_same_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = checkpoint(tied=True)
    matquant.load(out, bits=3).save_pretrained(tmp_path / "again")
    assert read_all(tmp_path / "again") == read_all(out)


def test_from_pretrained_reads_every_width(checkpoint: Callable[..., Path]) -> None:
    for tied in (True, False):
        out = checkpoint(tied=tied)
        asked = matquant.MatQuantConfig(bits=3)
        found = transformers.AutoModelForCausalLM.from_pretrained(out, quantization_config=asked, dtype=torch.float32)
        expected = matquant.load(out, bits=3, kernels="none", dtype=torch.float32)
        assert torch.equal(logits(found), logits(expected))


# --------------------------------------------------------------------------------------------------------------- plans


def test_a_search_chooses_the_width_of_the_head_too(
    checkpoint: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    out = checkpoint(tied=False, zero_point="midrange", affine="refit")
    opened = open_checkpoint(out)
    with open_losses(out, [text_file], samples=2, seq_len=32) as losses:
        assert set(losses.paths) == set(opened.shapes)
        chosen = []
        for bits in (3.3, 5.0, 8.0):
            budget = bits_budget(opened, bits, widths=(2, 4, 6, 8))
            plan, facts = make_plan(opened, budget, widths=(2, 4, 6, 8), losses=losses, evaluations=5)
            assert set(plan) == set(opened.shapes)
            assert facts["bits_per_weight"] <= bits
            chosen.append(sum(plan[path] for path in opened.ends))
        assert chosen == sorted(chosen)
        assert chosen[0] < chosen[-1]
        for strategy in ("pyramid", "increasing"):
            budget = bits_budget(opened, 6.5, widths=(2, 4, 8))
            plan, facts = make_plan(opened, budget, strategy=strategy, widths=(2, 4, 8))
            assert {plan[path] for path in opened.ends} == {6}
            assert facts["bits_per_weight"] <= 6.5


def test_losses_of_plans_that_change_the_embedding_are_those_of_a_whole_forward(
    checkpoint: Callable[..., Path], text_file: Path
) -> None:
    out = checkpoint(tied=True)
    opened = open_checkpoint(out)
    with open_losses(out, [text_file], samples=2, seq_len=32) as losses:
        ids = torch.from_numpy(losses.tokens)
        whole = matquant.load(out, dtype=torch.float32, kernels="none")
        for bits in (8, 2, 8, 4):
            plan = dict.fromkeys(opened.shapes, 8) | {EMBEDDING: bits}
            whole.set_bits(plan=plan)
            with torch.no_grad():
                found = whole(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
            assert losses.measure(plan)[1] == pytest.approx(-float(found.double().mean()), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize(
    ("to", "grid", "held"),
    [
        ("gguf", COMPANDED, True),
        ("gguf", UNIFORM, False),  # no type holds 64 levels with a zero-point of 31.625
        ("mlx", UNIFORM, True),
        ("compressed-tensors", UNIFORM, False),
    ],
)
def test_formats_hold_the_head_or_make_it_dense(
    to: str, grid: str, held: bool, checkpoint: Callable[..., Path]
) -> None:
    found = open_checkpoint(checkpoint(tied=True, group_size=32, zero_point="midrange", affine="refit", grid=grid))
    job = make_job(found, to, found.widths(4))
    assert (job.chosen[EMBEDDING] is not None) == held
    assert all(job.chosen[path] is not None for path in found.shapes if path != EMBEDDING)
    body = [path for path in found.shapes if path != EMBEDDING]
    stored = sum(job.weight(path).bytes for path in (found.shapes if held else body))
    weights = sum(np.prod(found.shapes[path]) for path in (found.shapes if held else body))
    assert job.bits_per_weight() == pytest.approx(8 * stored / weights)


def test_a_compressed_tensors_export_has_a_dense_head(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for tied in (True, False):
        source = checkpoint(tied=tied)
        export(source, tmp_path / str(tied), to="compressed-tensors", bits=8)
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(tied), dtype=torch.float32)
        expected = matquant.load(source, bits=8, kernels="none", dtype=torch.float32)
        assert (logits(found) - logits(expected)).abs().max() < 1e-4 * logits(expected).abs().max()


@pytest.mark.parametrize("bits", [7, 3])
def test_a_smaller_nested_export_reads_the_same(bits: int, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint(tied=True, zero_point="midrange", affine="refit")
    export(source, tmp_path / "out", to="matquant", bits=bits)
    found = open_checkpoint(tmp_path / "out")
    assert bool(found.ends) == (bits == 7)  # one width for all weights, or a dense head
    ours, expected = (matquant.load(place, bits=bits, kernels="none") for place in (tmp_path / "out", source))
    assert torch.equal(logits(ours), logits(expected))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.isfinite(logits(stock)).all()
