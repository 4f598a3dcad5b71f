"""lm-evaluation-harness through the server: likelihoods and answers are those of the engine.

The tasks and their data are written here: nothing is downloaded.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import matquant
from clients.conftest import CACHE, HERE, run_command
from environments import make_environment
from server_process import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]
CLOSE = 1e-4  # nats
BITS = 4
QUESTIONS = [
    ("Once upon a time, there was a little", [" dog", " girl named Lily", " xylophone"]),
    ("The dog was very", [" happy.", " sad because he lost his ball.", " of"]),
    ("She said:", [" Yes", ' "I want to play with you"', " the the"]),
    ("They went to the park and", [" played", " saw a big tree", " um"]),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
target_delimiter: ""
doc_to_text: "{{{{context}}}}"
"""
LIKELIHOOD = TASK + 'output_type: multiple_choice\ndoc_to_choice: "{{{{choices}}}}"\ndoc_to_target: 0\n'
ANSWER = TASK + (
    'output_type: generate_until\ndoc_to_target: "{{{{choices[0]}}}}"\nmetric_list: [{{metric: exact_match}}]\n'
    "generation_kwargs: {{until: [ZZZ], max_gen_toks: 12, do_sample: false}}\n"
)


def samples(folder: Path, server: Server, *, model: str, route: str, task: str, chat: bool = False) -> list[Any]:
    """What lm_eval logs of each question of a task."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"context": c, "choices": choices}) + "\n" for c, choices in QUESTIONS))
    (folder / "stories.yaml").write_text(task.format(name="stories", file=data))
    python = make_environment(CACHE / "clients", (HERE / "clients.txt").read_text().split())
    arguments = f"model=tiny:int{BITS},base_url={server.address}{route},num_concurrent=4,tokenizer_backend=remote"
    command = [python.with_name("lm_eval"), "--model", model, "--tasks", folder / "stories.yaml"]
    command += ["--model_args", arguments, "--log_samples", "--output_path", folder / "out"]
    run_command([*command, *(["--apply_chat_template"] if chat else [])])
    (file,) = (folder / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(found, key=lambda sample: sample["doc_id"])


def test_likelihoods_are_those_of_the_engine(checkpoint: Path, server: Server, tmp_path: Path) -> None:
    found = samples(tmp_path, server, model="local-completions", route="/v1/completions", task=LIKELIHOOD)
    engine, near, far = matquant.Engine(checkpoint, threads=1), 0, 0
    encode = engine.vocabulary.tokenizer.encode
    for (context, choices), sample in zip(QUESTIONS, found, strict=True):
        for choice, response in zip(choices, sample["filtered_resps"], strict=True):
            first = len(encode(context, add_special_tokens=False).ids)
            ids = encode(context + choice, add_special_tokens=False).ids
            wanted, other = (float(engine.score(ids, bits=bits)[first - 1 :].sum()) for bits in (BITS, BITS - 1))
            assert math.isclose(float(response[0]), wanted, abs_tol=CLOSE), (context, choice)
            near, far = near + 1, far + (abs(float(response[0]) - other) > CLOSE)
    assert near == far == 3 * len(QUESTIONS)  # the neighbouring width fails the same comparison


def test_answers_of_chats_are_those_of_the_engine(checkpoint: Path, server: Server, tmp_path: Path) -> None:
    route, model = "/v1/chat/completions", "local-chat-completions"
    found = samples(tmp_path, server, model=model, route=route, task=ANSWER, chat=True)
    engine = matquant.Engine(checkpoint, threads=1)
    for (context, _), sample in zip(QUESTIONS, found, strict=True):
        prompt = f"<|im_start|>user\n{context}<|im_end|>\n<|im_start|>assistant\n"
        ids = engine.vocabulary.tokenizer.encode(prompt, add_special_tokens=False).ids
        assert sample["resps"] == [[engine.generate(ids, bits=BITS, max_tokens=12)]]
