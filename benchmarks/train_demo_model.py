"""Train the small Qwen2 model that the demo and the tests use.

The text is the Python standard library of the interpreter that runs this script (PSF licence):
module sources as plain text, and each documented function as one chat turn (docstring -> source).
The embedded model is two runs of it with Python 3.11 on two CPU cores, held-out loss 1.91:

    python train_demo_model.py --out DIR --minutes 95 --vocab 2048 --hidden 256 --layers 6 \\
        --inter 704 --seq 320 --batch 12 --lr 3e-3
    python train_demo_model.py --out DIR --resume --minutes 27 [the same] --lr 1.5e-3

The budget is time and not steps, so the weights depend on the machine: this is how the model was
made, not a way to make the same bytes again. It is for tests and demonstrations: it completes
Python code, and long continuations repeat themselves.
"""

import argparse
import ast
import copy
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from subspec.runtime.kernels import bf16

EOS, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
HELD_OUT_MODULES, HELD_OUT_MODULE_TOKENS = 20, 20_000
HELD_OUT_TURNS, HELD_OUT_TURN_TOKENS = 100, 10_000
MAX_FUNCTION = 3000  # characters of a chat turn's answer


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    torch.manual_seed(0)
    modules, turns = read_texts()
    tokenizer = train_tokenizer(modules, args.vocab)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=EOS, chat_template=CHAT_TEMPLATE
    )
    wrapped.save_pretrained(args.out)
    model = build_model(args, wrapped)

    def save() -> None:
        save_in_bf16(model, wrapped, args.out)

    train(model, next_token_loss, save, *split_tokens(tokenizer, modules, turns), args)


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64: heads are 64")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--inter", type=int, default=704)
    parser.add_argument("--resume", action="store_true", help="go on from the model in --out")
    return parser.parse_args()


def argument_parser(description: str) -> argparse.ArgumentParser:
    """How a model is trained and where it goes, whatever the model is."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=100, help="of a CPU's time, each thread's")
    parser.add_argument("--seq", type=int, default=512, help="tokens of a training window")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=400, metavar="STEPS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def read_texts() -> tuple[list[str], list[str]]:
    """Modules and chat turns."""
    modules, turns = [], []
    for text in module_texts():
        modules.append(text + EOS)
        turns.extend(chat_turns(text))
    log(f"{len(modules)} modules of {sum(map(len, modules))} characters")
    log(f"{len(turns)} chat turns of {sum(map(len, turns))} characters")
    return modules, turns


def split_tokens(
    tokenizer: Tokenizer, modules: list[str], turns: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to train on, and tokens of texts that are held out. Shuffles the lists."""
    random.shuffle(modules)
    random.shuffle(turns)
    held_modules, modules = modules[:HELD_OUT_MODULES], modules[HELD_OUT_MODULES:]
    held_turns, turns = turns[:HELD_OUT_TURNS], turns[HELD_OUT_TURNS:]
    train_tokens = torch.cat([encode(tokenizer, modules), encode(tokenizer, turns)])
    held_modules_tokens = encode(tokenizer, held_modules)[:HELD_OUT_MODULE_TOKENS]
    held_turns_tokens = encode(tokenizer, held_turns)[:HELD_OUT_TURN_TOKENS]
    held_tokens = torch.cat([held_modules_tokens, held_turns_tokens])
    log(f"{len(train_tokens)} tokens to train on, {len(held_tokens)} held out")
    return train_tokens, held_tokens


def module_texts() -> Iterator[str]:
    """The standard library without its tests and its tables."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "encodings", "pydoc_data"} & set(parts):
            continue
        if any("test" in part for part in parts):
            continue
        try:
            yield path.read_text("utf-8")
        except UnicodeDecodeError:
            continue


def chat_turns(text: str) -> Iterator[str]:
    """One turn for each documented function: the first paragraph of its docstring -> its source."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring, code = ast.get_docstring(node), source_of(lines, node)
        if docstring and len(code) < MAX_FUNCTION:
            first = docstring.strip().split("\n\n")[0].replace("\n", " ")
            yield (
                f"{START}user\nWrite the Python function {node.name}: {first}{END}\n"
                f"{START}assistant\n{code}{END}\n{EOS}"
            )


def source_of(lines: list[str], node: ast.FunctionDef) -> str:
    """As ast.get_source_segment, which splits the whole text each time."""
    own = lines[node.lineno - 1 : node.end_lineno]
    own[-1] = own[-1].encode()[: node.end_col_offset].decode()
    return "\n".join([own[0][node.col_offset :], *own[1:]])


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    tokens = [token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids]
    return torch.tensor(tokens, dtype=torch.long)


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    if args.resume:
        model = Qwen2ForCausalLM.from_pretrained(args.out, dtype=torch.float32)
        return model.to(args.device)
    config = Qwen2Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.inter,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config).to(args.device)


def build_optimizers(model: PreTrainedModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices; AdamW for embedding, norms and biases."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adam]


def scheduled_lr(peak: float, warmup_steps: int, step: int, fraction: float) -> float:
    """Warm up by steps, hold, then fall linearly over the last 40 % of the time."""
    decay = 1.0 if fraction < 0.6 else max(0.02, (1 - fraction) / 0.4)
    return peak * min(1.0, (step + 1) / warmup_steps) * decay


def mixed_precision(device: str) -> torch.autocast:
    """bf16 where it is fast."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or bf16.is_native())


def next_token_loss(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """windows: tokens [batch, seq]."""
    return model(input_ids=windows, labels=windows).loss


def train(
    model: PreTrainedModel,
    loss_of: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor],
    save: Callable[[], None],
    train_tokens: torch.Tensor,
    held_tokens: torch.Tensor,
    args: argparse.Namespace,
) -> None:
    """Saves now and then, so that it can be stopped at any time."""
    log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    optimizers = build_optimizers(model, args.lr)
    clock = time.process_time if args.device == "cpu" else time.time
    start, step, seen = clock(), 0, 0
    total_seconds = args.minutes * 60 * (torch.get_num_threads() if args.device == "cpu" else 1)
    while (elapsed := clock() - start) < total_seconds:
        lr = scheduled_lr(args.lr, args.warmup_steps, step, elapsed / total_seconds)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        first = torch.randint(0, len(train_tokens) - args.seq - 1, (args.batch,))
        windows = torch.stack([train_tokens[i : i + args.seq] for i in first]).to(args.device)
        with mixed_precision(args.device):
            loss = loss_of(model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
        seen += windows.numel()
        if step % 10 == 0:
            speed = seen / (clock() - start)
            log(f"step {step}: {seen / 1e6:.2f} M tokens, {speed:.0f} tokens/s, lr {lr:.1e}")
            log(f"  loss {loss.item():.3f}")
        if step % args.save_every == 0 or step == 100:
            evaluate(model, held_tokens, args)
            save()
    evaluate(model, held_tokens, args)
    save()
    log(f"{step} steps, {seen / 1e6:.1f} M tokens")


@torch.no_grad()
def evaluate(model: PreTrainedModel, held_tokens: torch.Tensor, args: argparse.Namespace) -> None:
    model.eval()
    num_rows = len(held_tokens) // args.seq
    rows = held_tokens[: num_rows * args.seq].view(num_rows, args.seq).to(args.device)
    with mixed_precision(args.device):
        losses = [next_token_loss(model, row[None]).item() for row in rows]
    log(f"held-out loss {sum(losses) / len(losses):.4f}")
    model.train()


def save_in_bf16(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    saved = copy.deepcopy(model).to("cpu", torch.bfloat16)
    saved.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    saved.save_pretrained(out)


if __name__ == "__main__":
    main()
