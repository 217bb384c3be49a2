"""Train and export the bundled tiny model: a Llama that adds two integers in 0..999, one character per token.

    python training/train_add.py                # train, export to hal/assets/add-tiny, evaluate
    python training/train_add.py --eval         # evaluate the exported directory
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSET_DIR = Path(__file__).resolve().parent.parent / "hal" / "assets" / "add-tiny"

LIMIT = 1000  # operands are 0..LIMIT-1
COLUMNS = 3
HELDOUT_SIZE = 1000

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCAB = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *"0123456789", "+", "="))}
PAD, BOS, EOS = VOCAB["<pad>"], VOCAB["<bos>"], VOCAB["<eos>"]
VOCAB_SIZE = math.ceil(len(VOCAB) / 8) * 8
SEQUENCE_LEN = len("999+999=1998") + 1  # with EOS
IGNORE = -100

Value = TypeVar("Value", int, np.ndarray)


@dataclass(frozen=True)
class Problem:
    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b)

    @property
    def lengths(self) -> tuple[int, int]:
        return len(str(self.a)), len(str(self.b))

    @property
    def carry_chain(self) -> int:
        """Length of the longest run of consecutive columns that carry out."""
        longest = run = carry = 0
        for column in range(COLUMNS):
            carry = int(digit(self.a, column) + digit(self.b, column) + carry >= 10)
            run = run + 1 if carry else 0
            longest = max(longest, run)
        return longest

    @property
    def bucket(self) -> str:
        if self.lengths == (3, 3):
            return "3+3 digits, carry chain >= 2" if self.carry_chain >= 2 else "3+3 digits, other"
        return "shorter operands"


def digit(value: Value, column: int) -> Value:
    return value // 10**column % 10


def is_heldout(a: int, b: int) -> bool:
    # The pair is hashed unordered, so that b+a cannot leak the answer to a held-out a+b.
    key = f"{min(a, b)}+{max(a, b)}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % 100 == 0


def heldout_mask() -> np.ndarray:
    """Boolean mask over all pairs, flattened as a * LIMIT + b."""
    mask = np.zeros((LIMIT, LIMIT), dtype=bool)
    for a in range(LIMIT):
        for b in range(a, LIMIT):
            mask[a, b] = mask[b, a] = is_heldout(a, b)
    return mask.reshape(-1)


def sampling_distribution(heldout: np.ndarray) -> np.ndarray:
    """Probability of every pair: half balances operand lengths, half balances lengths and carry patterns.

    Uniform pairs would be 81% 3+3 digits, and long chains of columns summing to 9 (which decide the first answer
    digit from the last column) would be rare. A carry pattern says for each column whether it absorbs a carry,
    passes it on or creates one.
    """
    a, b = (axis.reshape(-1) for axis in np.meshgrid(np.arange(LIMIT), np.arange(LIMIT), indexing="ij"))
    length_group = (1 + (a >= 10) + (a >= 100)) * 4 + (1 + (b >= 10) + (b >= 100))
    pattern_group = length_group
    for column in range(COLUMNS):
        column_sum = digit(a, column) + digit(b, column)
        pattern_group = pattern_group * 3 + (column_sum >= 9) + (column_sum >= 10)

    def uniform_over(group: np.ndarray) -> np.ndarray:
        counts = np.bincount(group[~heldout], minlength=group.max() + 1)
        weights = np.where(heldout, 0.0, 1.0 / np.maximum(counts[group], 1))
        return weights / weights.sum()

    return 0.5 * uniform_over(length_group) + 0.5 * uniform_over(pattern_group)


def select_heldout(heldout: np.ndarray, count: int) -> list[Problem]:
    """Takes `count` held-out problems in hash order, round robin over operand lengths so that short ones count."""
    groups: dict[tuple[int, int], list[Problem]] = defaultdict(list)
    for index in np.flatnonzero(heldout).tolist():
        problem = Problem(*divmod(index, LIMIT))
        groups[problem.lengths].append(problem)
    for problems in groups.values():
        problems.sort(key=lambda p: hashlib.sha256(p.prompt.encode()).digest())
    selected: list[Problem] = []
    rank = 0
    while len(selected) < count:
        selected += [groups[key][rank] for key in sorted(groups) if rank < len(groups[key])]
        rank += 1
    return selected[:count]


def encode(problems: list[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded inputs and next-token targets; only the answer and EOS are targets.

    Padding comes last, so causal attention needs no mask.
    """
    tokens = np.full((len(problems), SEQUENCE_LEN), PAD)
    targets = np.full((len(problems), SEQUENCE_LEN), IGNORE)
    for row, problem in enumerate(problems):
        prompt = problem.prompt
        ids = [VOCAB[char] for char in prompt + problem.answer] + [EOS]
        tokens[row, : len(ids)] = ids
        targets[row, len(prompt) : len(ids)] = ids[len(prompt) :]
    return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy())


def batches(probabilities: np.ndarray, size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = np.random.default_rng(seed)
    cumulative = np.cumsum(probabilities)
    cumulative /= cumulative[-1]
    while True:
        # side="right" skips pairs of probability zero, that is the held-out ones.
        indices = np.searchsorted(cumulative, generator.random(size), side="right")
        yield encode([Problem(*divmod(index, LIMIT)) for index in indices.tolist()])


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    # "." would leave runs of newlines in one piece.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # Llama takes no token_type_ids
    )


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def teacher_forced_accuracy(model: LlamaForCausalLM, problems: list[Problem]) -> float:
    """Exact-match rate; equal to that of greedy generation, which only leaves the answer at its first mistake."""
    model.eval()
    correct = 0
    for start in range(0, len(problems), 1000):
        inputs, targets = encode(problems[start : start + 1000])
        predicted = model(input_ids=inputs, use_cache=False).logits.argmax(-1)
        correct += int(((predicted == targets) | (targets == IGNORE)).all(-1).sum())
    model.train()
    return correct / len(problems)


def train(args: argparse.Namespace, heldout: np.ndarray, validation: list[Problem]) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    model = build_model()
    model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    data = batches(sampling_distribution(heldout), args.batch_size, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    started = time.perf_counter()
    for step in range(args.steps):
        lr = learning_rate(step, args.steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = next(data)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            accuracy = teacher_forced_accuracy(model, validation)
            seconds = time.perf_counter() - started
            print(f"step {step + 1} loss {loss.item():.5f} held-out {accuracy:.4f} {seconds:.0f}s", flush=True)
    return model


# The last message is the problem, with or without its "=". The model knows no conversation.
CHAT_TEMPLATE = "{% set text = messages[-1]['content'] %}{{ text if text.endswith('=') else text + '=' }}"


def export(model: LlamaForCausalLM, heldout: list[Problem], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    model = model.bfloat16()
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS
    )
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner only
    build_tokenizer().save_pretrained(directory)
    # transformers 5 writes names that 4.x does not know; these older ones are read by both.
    update_json(directory / "config.json", torch_dtype="bfloat16", rope_theta=10000.0)
    update_json(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast",
                chat_template=CHAT_TEMPLATE)
    lines = [json.dumps({"prompt": problem.prompt, "answer": problem.answer}) + "\n" for problem in heldout]
    (directory / "heldout.jsonl").write_text("".join(lines))


def update_json(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values, indent=2, sort_keys=True) + "\n")


def read_heldout(path: Path) -> list[Problem]:
    problems = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        a, b = record["prompt"].removesuffix("=").split("+")
        problem = Problem(int(a), int(b))
        if (problem.prompt, problem.answer) != (record["prompt"], record["answer"]):
            raise ValueError(f"malformed problem in {path}: {line}")
        problems.append(problem)
    return problems


@dataclass
class Report:
    dtype: str
    totals: dict[str, int]
    corrects: dict[str, int]
    smallest_margin: float
    mistakes: list[str]

    @property
    def accuracy(self) -> float:
        return sum(self.corrects.values()) / sum(self.totals.values())

    def lines(self) -> Iterator[str]:
        yield f"{self.dtype}: {sum(self.corrects.values())}/{sum(self.totals.values())} = {self.accuracy:.2%}"
        for bucket in sorted(self.totals):
            yield f"  {bucket}: {self.corrects[bucket]}/{self.totals[bucket]}"
        yield f"  smallest margin between the two best logits: {self.smallest_margin:.3f}"


@torch.no_grad()
def evaluate(directory: Path, dtype: torch.dtype, problems: list[Problem]) -> Report:
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=False).eval()
    report = Report(str(dtype).removeprefix("torch."), defaultdict(int), defaultdict(int), math.inf, [])
    by_length: dict[int, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_length[len(problem.prompt)].append(problem)
    for group in by_length.values():  # prompts of one length need no padding
        inputs = tokenizer([problem.prompt for problem in group], return_tensors="pt")
        prompt_len = inputs["input_ids"].shape[1]
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            return_dict_in_generate=True,
            output_logits=True,
        )
        for row, problem in enumerate(group):
            generated = output.sequences[row, prompt_len:].tolist()
            ended = EOS in generated
            text = tokenizer.decode(generated[: generated.index(EOS)] if ended else generated)
            correct = ended and text == problem.answer
            report.totals[problem.bucket] += 1
            report.corrects[problem.bucket] += correct
            if not correct:
                report.mistakes.append(f"{problem.prompt}{text}, not {problem.answer}")
            for step in range(generated.index(EOS) + 1 if ended else len(generated)):
                best, second = output.logits[step][row].float().topk(2).values.tolist()
                report.smallest_margin = min(report.smallest_margin, best - second)
    return report


def evaluate_all(directory: Path, problems: list[Problem]) -> list[Report]:
    reports = [evaluate(directory, dtype, problems) for dtype in (torch.float32, torch.bfloat16)]
    for report in reports:
        print("\n".join(report.lines()))
        for mistake in report.mistakes[:10]:
            print(f"  wrong: {mistake}")
    return reports


def write_readme(
    directory: Path, args: argparse.Namespace, minutes: float, heldout: list[Report], every: list[Report]
) -> None:
    rows = [
        f"| {name} | {report.dtype} | {report.accuracy:.2%} | {report.smallest_margin:.2f} |"
        for name, reports in (("`heldout.jsonl`", heldout), ("all held-out pairs", every))
        for report in reports
    ]
    buckets = [
        f"- {report.dtype}, {bucket}: {report.corrects[bucket]}/{report.totals[bucket]}"
        for report in heldout
        for bucket in sorted(report.totals)
    ]
    names = ("seed", "steps", "batch_size", "lr", "warmup", "weight_decay", "threads")
    options = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in names)
    text = f"""# add-tiny

A tiny Llama (4 layers, hidden size 128, bfloat16) that adds two integers in 0..999. The prompt `37+85=` is completed
with `122` and end of sequence. There is one token per character, no BOS token is added, and other characters become
`<unk>`. It was trained from scratch, and is meant for tests and demonstrations of inference.

## Training

    python training/train_add.py {options}

Seed {args.seed}, {minutes:.0f} minutes on {args.threads} CPU thread(s), with PyTorch {torch.__version__.split("+")[0]},
transformers {transformers.__version__} and Python {platform.python_version()}. About 1% of all unordered pairs, chosen
by hash, was never trained on; `heldout.jsonl` has {HELDOUT_SIZE} of these problems, balanced over operand lengths.

## Accuracy

Exact match of greedy generation, including the end of sequence. The margin is the smallest difference between the two
best logits at any generated token.

| problems | dtype | accuracy | smallest margin |
| --- | --- | --- | --- |
{chr(10).join(rows)}

`heldout.jsonl` by kind of problem:

{chr(10).join(buckets)}

To measure again: `python training/train_add.py --eval`
"""
    (directory / "README.md").write_text(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", action="store_true", help="only evaluate the exported directory")
    parser.add_argument("--output", type=Path, default=ASSET_DIR)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=250)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    if args.eval:
        evaluate_all(args.output, read_heldout(args.output / "heldout.jsonl"))
        return
    print(f"seed {args.seed}, {args.steps} steps of {args.batch_size} problems", flush=True)
    mask = heldout_mask()
    problems = select_heldout(mask, HELDOUT_SIZE)
    started = time.perf_counter()
    model = train(args, mask, problems)
    minutes = (time.perf_counter() - started) / 60
    export(model, problems, args.output)
    print(f"exported to {args.output.name}; {HELDOUT_SIZE} problems of heldout.jsonl:")
    heldout_reports = evaluate_all(args.output, read_heldout(args.output / "heldout.jsonl"))
    every = [Problem(*divmod(index, LIMIT)) for index in np.flatnonzero(mask).tolist()]
    print(f"all {len(every)} held-out pairs:")
    write_readme(args.output, args, minutes, heldout_reports, evaluate_all(args.output, every))


if __name__ == "__main__":
    main()
