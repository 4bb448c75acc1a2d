"""Short tasks of the lm-evaluation-harness on converted models, alone and after many examples.

    python benchmarks/convert_short_tasks.py --model full=SmolLM2-135M-Instruct --model 256=converted \
        --data data --work work --out docs/results/convert_short.json

It needs lm-eval, and no network: `--data` is a folder with the files of the public repositories of the data
sets, `valid.jsonl` and `valid-labels.lst` of PIQA, `copa-dev.xml` and `copa-test.xml` of COPA, and the folder
`blimp` with the 67 files of BLiMP. The tasks are lm-eval's own, with these files in place of the hub's. They
are written into `--work`, where `ovq eval harness --include-path` can use them as well.

Alone, a question fits into what a converted model keeps exactly, and shows nothing but rounding: the first
two models are asked in this way. All are asked after `--examples` that are answered, the same ones for all
questions of a group, and other ones in each of `--groups` groups. Each group of examples is read once, and
its questions go on from a copy of the cache; that changes scores by rounding only. Answers are kept in
`--work`, and models that have answered are not asked again. All models have the weights of the converted
ones (bfloat16), and compute in `--dtype`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ovq.convert import load
from ovq.convert.saving import memory_config_in
from ovq.hf.cache import CACHE_KEY
from ovq.runtime.files import write_atomic
from ovq_lab.eval.models import branch, new_cache
from ovq_lab.eval.reading import read_pieces

OWN = Path(lm_eval.__file__).parent / "tasks"
# What lm-eval calls its tasks, and where they are.
TASKS = {"piqa": "piqa/piqa.yaml", "copa": "super_glue/copa/default.yaml", "blimp": "blimp/_template_yaml"}
# Fewer tokens than these in common are not worth a cache of their own.
FEWEST_SHARED = 256


@torch.no_grad()
def main() -> None:
    """Write the tasks, ask all models, and compare them with the first."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    names = write_tasks(arguments)
    rows: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for place, given in enumerate(arguments.model):
        name, folder = given.split("=", 1)
        path = arguments.work / f"answers_{name}.json"
        if not path.exists():
            # Alone, memories compute what full attention does but for rounding: one of them is enough.
            asked = names if place < 2 else [each for each in names if "_0_" not in each]
            write_atomic(path, json.dumps(answered(folder, asked, arguments)) + "\n")
        answers.append(json.loads(path.read_text()))
        for key, own in answers[-1].items():
            task, examples = key.split("_")
            about = {"model": name, "task": task, "examples": int(examples)}
            rows.append(about | compared(own, answers[0][key]))
            print(rows[-1], flush=True)
        about = {
            key: value if isinstance(value, int) else str(value) for key, value in vars(arguments).items()
        }
        write_atomic(arguments.out, json.dumps({"rows": rows, "about": about}, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", action="append", required=True, metavar="NAME=DIR", help="the first is full"
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="a folder for tasks and answers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--questions", type=int, nargs=3, default=[400, 400, 670], help="piqa, copa, blimp")
    parser.add_argument("--examples", type=int, nargs=3, default=[40, 100, 200], help="likewise")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def write_tasks(arguments: argparse.Namespace) -> list[str]:
    """Write each task of each group, alone and after examples, and return their names."""
    folder = arguments.work / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    sizes = dict(zip(TASKS, zip(arguments.questions, arguments.examples, strict=True), strict=True))
    for task in arguments.tasks:
        questions, examples = sizes[task]
        asked, shown = documents(task, arguments.data, arguments.groups * examples)
        for group in range(arguments.groups):
            own = asked[group : questions : arguments.groups]
            files = {"train": shown[group * examples :][:examples], "validation": own}
            paths = {}
            for split, docs in files.items():
                paths[split] = folder / f"{task}_{group}_{split}.jsonl"
                paths[split].write_text("".join(json.dumps(doc) + "\n" for doc in docs))
            for num in (0, examples):
                names.append(f"{task}_{num}_{group}")
                content = {
                    "include": str(OWN / TASKS[task]),
                    "task": names[-1],
                    "dataset_path": "json",
                    "dataset_name": None,
                    "dataset_kwargs": {"data_files": {split: str(p) for split, p in paths.items()}},
                    "training_split": "train",
                    "validation_split": "validation",
                    "fewshot_split": "train",
                    "fewshot_config": {"sampler": "first_n"},
                    "num_fewshot": num,
                }
                # JSON is YAML.
                (folder / f"{names[-1]}.yaml").write_text(json.dumps(content, indent=1))
    return names


def documents(task: str, data: Path, num_shown: int) -> tuple[list[Any], list[Any]]:
    """Questions of a task in a random order, and others that are shown as examples, all with answers."""
    order = random.Random(0)
    if task == "copa":
        # Examples are those that the authors meant for development.
        parts = [copa_documents(data / f"copa-{name}.xml") for name in ("test", "dev")]
        for part in parts:
            order.shuffle(part)
        return parts[0], parts[1][:num_shown]
    if task == "piqa":
        labels = (data / "valid-labels.lst").read_text().split()
        lines = (data / "valid.jsonl").read_text().splitlines()
        docs = [json.loads(line) | {"label": int(label)} for line, label in zip(lines, labels, strict=True)]
        order.shuffle(docs)
        return docs[num_shown:], docs[:num_shown]
    paradigms = [path.read_text().splitlines() for path in sorted((data / "blimp").glob("*.jsonl"))]
    for lines in paradigms:
        order.shuffle(lines)
    # One of each of the 67 after another, so that any number of them is spread over all.
    lines = [json.loads(line) for turn in zip(*paradigms, strict=True) for line in turn]
    # The other fields are not the same in all files.
    lines = [{key: line[key] for key in ("sentence_good", "sentence_bad", "UID")} for line in lines]
    shown = lines[-num_shown:]
    order.shuffle(shown)
    return lines[:-num_shown], shown


def copa_documents(path: Path) -> list[dict[str, Any]]:
    """The questions of a file, as SuperGLUE names their parts."""
    return [
        {
            "premise": item.findtext("p"),
            "choice1": item.findtext("a1"),
            "choice2": item.findtext("a2"),
            "question": item.get("asks-for"),
            "label": int(item.get("most-plausible-alternative", "")) - 1,
        }
        for item in ElementTree.parse(path).getroot()
    ]


class SharedExamples(HFLM):
    """The harness's model, but what many requests have in common at their beginning is read once."""

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        tokens = [[*context, *continuation] for _, context, continuation in requests]
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        runs: list[list[int]] = [[]]
        while order:
            # Whatever lies between two in this order begins with what both have in common.
            one = tokens[order[0]]
            num = next(
                (n for n, i in enumerate(order) if num_shared(one, tokens[i]) < FEWEST_SHARED), len(order)
            )
            if num > 1:
                runs.append(order[:num])
            else:
                runs[0].append(order[0])
            order = order[max(num, 1) :]
        answers: list[Any] = [None] * len(tokens)
        for run in runs:
            shared = 0
            if run is not runs[0]:
                # A token whose prediction counts is read with its question.
                limits = [len(requests[i][1]) - 1 for i in run]
                shared = min(num_shared(tokens[run[0]], tokens[run[-1]]), *limits)
            cache = new_cache(self.model)
            if shared:
                list(read_pieces(self.model, torch.tensor(tokens[run[0]][:shared]), cache))
            run.sort(key=lambda i: len(tokens[i]))
            for first in range(0, len(run), self.batch_size):
                batch = run[first : first + self.batch_size]
                rests = [torch.tensor(tokens[i][shared:]) for i in batch]
                read = self._read_side_by_side if isinstance(cache, DynamicCache) else self._read_as_rows
                hidden = read(cache, [rest[:-1] for rest in rests])
                for i, rest, states in zip(batch, rests, hidden, strict=True):
                    answers[i] = self._scored(rest, states, len(requests[i][2]))
            print(f"{shared} tokens, then {len(run)} texts", file=sys.stderr, flush=True)
        return answers

    def _read_as_rows(self, cache: Any, texts: list[Tensor]) -> list[Tensor]:
        """Hidden states of texts that go on from the same cache, each in a row of its own."""
        # Nothing that comes before it sees the padding.
        inputs = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        own = branch(cache)
        if own.get_seq_length():
            own.batch_repeat_interleave(len(texts))
        return list(self.model.base_model(inputs, **{CACHE_KEY: own}).last_hidden_state)

    def _read_side_by_side(self, cache: DynamicCache, texts: list[Tensor]) -> list[Tensor]:
        """The same with full attention, in one row, so that keys and values of the cache are not copied."""
        before, lengths = cache.get_seq_length(), [len(text) for text in texts]
        blocks = torch.block_diag(*(torch.ones(num, num).tril() for num in lengths)).bool()
        is_seen = torch.cat([torch.ones(len(blocks), before, dtype=torch.bool), blocks], 1)
        places = torch.cat([torch.arange(before, before + num) for num in lengths])
        given = {"attention_mask": is_seen[None, None], "position_ids": places[None], CACHE_KEY: cache}
        [hidden] = self.model.base_model(torch.cat(texts)[None], **given).last_hidden_state
        cache.crop(-sum(lengths))
        return list(hidden.split(lengths))

    def _scored(self, rest: Tensor, states: Tensor, num: int) -> tuple[float, bool]:
        targets = rest[-num:]
        logits = self.model.get_output_embeddings()(states[len(rest) - 1 - num : len(rest) - 1]).float()
        chosen = logits.log_softmax(-1).gather(-1, targets[:, None])
        return float(chosen.sum()), bool((logits.argmax(-1) == targets).all())


def num_shared(one: list[int], other: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def answered(folder: str, names: list[str], arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """What a model makes of each question: whether right, the likelihood of the right answer, the tokens."""
    is_converted = memory_config_in(folder) is not None
    dtype = torch.bfloat16
    if is_converted:
        model = load(folder, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = SharedExamples(
        pretrained=model.to(getattr(torch, arguments.dtype)).eval(),
        backend="causal",
        tokenizer=tokenizer,
        batch_size=arguments.batch_size,
        max_length=8192,
    )
    manager = TaskManager(include_path=str(arguments.work / "tasks"), include_defaults=False)
    results = lm_eval.simple_evaluate(model=asked, tasks=names, task_manager=manager, bootstrap_iters=0)
    found: dict[str, list[Any]] = {}
    for own in names:
        for sample in sorted(results["samples"][own], key=lambda sample: sample["doc_id"]):
            likelihoods = [response[0][0] for response in sample["resps"]]
            # Of COPA the harness keeps the text of the right answer.
            target = str(sample["target"]).strip()
            texts = [argument[1].strip() for argument in sample["arguments"]]
            right = int(target) if target.isdigit() else texts.index(target)
            tokens = len(tokenizer(sample["arguments"][right][0])["input_ids"])
            found.setdefault(own.rsplit("_", 1)[0], []).append((sample["acc"], likelihoods[right], tokens))
    return found


def compared(own: list[Any], first: list[Any]) -> dict[str, Any]:
    """How many answers are right, and which differ from those of the first model."""
    pairs = [(a[0], b[0]) for a, b in zip(own, first, strict=True)]
    num = len(own)
    return {
        "questions": num,
        "right": int(sum(a for a, _ in pairs)),
        "right_only_here": sum(a > b for a, b in pairs),
        "right_only_by_the_first": sum(a < b for a, b in pairs),
        "loss_of_right_answers": round(-sum(each[1] for each in own) / num, 4),
        "prompt_tokens": round(sum(each[2] for each in own) / num),
    }


if __name__ == "__main__":
    main()
