"""Train the small Qwen2 model that the demo and the tests use.

The text is the Python standard library of the interpreter that runs this script (PSF licence):
module sources as plain text, and each documented function as one chat turn (docstring -> source).

    python train_demo_model.py --out DIR --minutes 100
"""

import argparse, ast, json, math, random, sysconfig, time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

EOS, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def sources():
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if (
            "site-packages" in parts
            or any("test" in p for p in parts)
            or "encodings" in parts
            or "pydoc_data" in parts
        ):
            continue
        try:
            yield path, path.read_text("utf-8")
        except UnicodeDecodeError:
            continue


def chats(text):
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node)
            code = ast.get_source_segment(text, node)
            if doc and code and len(code) < 3000:
                first = doc.strip().split("\n\n")[0].replace("\n", " ")
                yield (
                    f"{START}user\nWrite the Python function {node.name}: {first}{END}\n"
                    f"{START}assistant\n{code}{END}\n{EOS}"
                )


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", required=True)
    ap.add_argument("--minutes", type=float, default=100)
    ap.add_argument("--vocab", type=int, default=4096)
    ap.add_argument("--hidden", type=int, default=256)
    ap.add_argument("--layers", type=int, default=8)
    ap.add_argument("--inter", type=int, default=704)
    ap.add_argument("--seq", type=int, default=512)
    ap.add_argument("--batch", type=int, default=12)
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--resume", action="store_true", help="go on from the model in --out")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = ap.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    torch.manual_seed(0)
    docs, turns = [], []
    for _, text in sources():
        docs.append(text + EOS)
        turns.extend(chats(text))
    print(
        "modules",
        len(docs),
        "chars",
        sum(map(len, docs)),
        "chats",
        len(turns),
        "chars",
        sum(map(len, turns)),
        flush=True,
    )

    tok = Tokenizer(models.BPE(byte_fallback=False))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        docs,
        trainers.BpeTrainer(
            vocab_size=args.vocab,
            special_tokens=[EOS, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token=END, pad_token=EOS, chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(out)
    random.shuffle(docs)
    random.shuffle(turns)
    held_docs, docs = docs[:20], docs[20:]
    held_turns, turns = turns[:100], turns[100:]
    enc = lambda items: torch.tensor(
        [i for e in tok.encode_batch(items) for i in e.ids], dtype=torch.long
    )
    train = torch.cat([enc(docs), enc(turns)])
    held = torch.cat([enc(held_docs)[:20000], enc(held_turns)[:10000]])
    print("train tokens", len(train), "held-out", len(held), flush=True)

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
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    model = (
        Qwen2ForCausalLM.from_pretrained(out, dtype=torch.float32)
        if args.resume
        else Qwen2ForCausalLM(config)
    )
    model.to(args.device)
    print("params", sum(p.numel() for p in model.parameters()) / 1e6, "M", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    muon = torch.optim.Muon(
        matrices, lr=args.lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    start, step, seen = time.time(), 0, 0
    total = args.minutes * 60
    autocast = torch.autocast(args.device, dtype=torch.bfloat16)
    while (elapsed := time.time() - start) < total:
        frac = elapsed / total
        lr = (
            args.lr
            * min(1.0, (step + 1) / 100)
            * (1.0 if frac < 0.6 else max(0.02, (1 - frac) / 0.4))
        )
        for g in muon.param_groups + adam.param_groups:
            g["lr"] = lr
        at = torch.randint(0, len(train) - args.seq - 1, (args.batch,))
        batch = torch.stack([train[i : i + args.seq] for i in at]).to(args.device)
        with autocast:
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        seen += batch.numel()
        if step % 50 == 0:
            print(
                f"step {step} tokens {seen / 1e6:.2f}M loss {loss.item():.3f} lr {lr:.1e} {seen / (time.time() - start):.0f} tok/s",
                flush=True,
            )
        if step % 400 == 0 or step == 100:
            evaluate_and_save(model, held, args, out, fast)
    evaluate_and_save(model, held, args, out, fast)
    print(f"{step} steps, {seen / 1e6:.1f}M tokens", flush=True)


@torch.no_grad()
def evaluate_and_save(model, held, args, out, fast):
    model.eval()
    rows = held[: len(held) // args.seq * args.seq].view(-1, args.seq).to(args.device)
    with torch.autocast(args.device, dtype=torch.bfloat16):
        losses = [model(input_ids=r[None], labels=r[None]).loss.item() for r in rows]
    print("held-out loss", sum(losses) / len(losses), flush=True)
    import copy

    saved = copy.deepcopy(model).to("cpu", torch.bfloat16)
    saved.generation_config.eos_token_id = [fast.eos_token_id, fast.pad_token_id]
    saved.save_pretrained(out)
    model.train()


main()
