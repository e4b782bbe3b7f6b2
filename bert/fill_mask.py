"""Fills gaps in texts: `python -m bert.fill_mask --help` tells how."""

import json
import sys
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple, cast

from bert.evaluate import has_heads
from data.commands import check_options, option, parse_options, run_command
from data.errors import InputError
from data.tokenizer import make_tokenizer, read_vocab

__all__ = ["FillMaskOptions", "fill_mask", "main"]

MASK = "[MASK]"
BAR_WIDTH, EIGHTHS = 30, " ▏▎▍▌▋▊▉"
EXAMPLES = """examples:
  python -m bert.fill_mask runs/quickstart/checkpoints/step_00000640 "The capital of France is [MASK]."
  python -m bert.fill_mask bert-base-uncased "[MASK] wrote [MASK]." "A [MASK] barks." --top-k 3 --json"""


@dataclass
class FillMaskOptions:
    """The tokens that a model holds most probable for each [MASK] of texts. With several in one text, each is
    predicted as if the others stay masked."""

    checkpoint: str = option(flag="checkpoint")
    """a checkpoint of a run, of one process or of many, or any BERT folder of transformers with an MLM head"""
    texts: List[str] = option(flag="texts", metavar="TEXT")
    """a text with one [MASK] or several, in quotes"""
    top_k: int = option(5, lambda value: value > 0, "1 or more")
    """tokens that are shown for each [MASK]"""
    json: bool = option(False)
    """print one JSON list in place of the bars"""


def fill_mask(options: FillMaskOptions) -> List[Dict[str, Any]]:
    """For each text, `text` and `masks`. Each mask has its `position` among the text's tokens, [CLS] being 0, and
    `tokens`, the most probable first: `token`, `token_id`, `probability`.

    Raises InputError for a text without [MASK] or longer than the model's positions, and for a folder that has no MLM
    head.
    """
    import torch  # here, for it takes seconds

    from bert.config import TaskConfig
    from bert.model.batch import Batch
    from bert.run.inference import load_model
    from bert.start_from import read_model
    from bert.tasks.pretraining import PretrainingHeads

    check_options(options)
    path = options.checkpoint
    there = read_model(path)
    has_heads(path, there)
    tokens, encoded = encode(path, options.texts, there)
    model = load_model(path, TaskConfig(nsp=False))
    heads, filled = cast(PretrainingHeads, model.cls), []
    for text, ids in zip(options.texts, encoded):
        row = torch.tensor([ids])
        ones, positions = torch.ones_like(row), torch.arange(len(ids))[None]
        fields = {"input_ids": row, "token_type_ids": ones - 1, "position_ids": positions, "sample_ids": ones}
        masks = [i for i, number in enumerate(ids) if number == tokens.index(MASK)]
        with torch.no_grad():
            logits = heads.mlm_logits(model.encode(Batch.of_rows(fields)), torch.tensor([masks]))
        # A model may have more ids than the vocabulary has tokens: they share in the probability, and have no name.
        best = logits.softmax(-1)[:, : len(tokens)].topk(min(options.top_k, len(tokens)))
        candidates = [
            [{"token": tokens[i], "token_id": i, "probability": p} for p, i in zip(*pair)]
            for pair in zip(best.values.tolist(), best.indices.tolist())
        ]
        filled.append({"text": text, "masks": [dict(position=i, tokens=t) for i, t in zip(masks, candidates)]})
    return filled


def encode(path: str, texts: Sequence[str], model: Dict[str, Any]) -> Tuple[List[str], List[List[int]]]:
    """The vocabulary's tokens, and the token ids of each text between [CLS] and [SEP]."""
    vocabulary = read_vocab(path)
    tokens, tokenizer, encoded = vocabulary.tokens, make_tokenizer(vocabulary), []
    if len(tokens) > model["vocab_size"]:
        raise InputError(f"{path}: its vocabulary has {len(tokens)} tokens, and its model {model['vocab_size']}")
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        ids = [tokens.index("[CLS]"), *ids, tokens.index("[SEP]")]
        if tokens.index(MASK) not in ids:
            raise InputError(f"{text!r}: has no {MASK}; expected one or more, in capitals, where a token is wanted")
        if len(ids) > model["max_position_embeddings"]:
            raise InputError(
                f"{text[:40]!r}...: has {len(ids)} tokens, with [CLS] and [SEP], and {path} has "
                f"{model['max_position_embeddings']} positions. Shorten the text"
            )
        encoded.append(ids)
    return tokens, encoded


def report(options: FillMaskOptions) -> str:
    filled = fill_mask(options)
    if options.json:
        return json.dumps(filled, indent=2, ensure_ascii=False)
    lines = []
    for text in filled:
        lines.append(text["text"])
        for number, mask in enumerate(text["masks"], 1):
            lines += [f"  {MASK} {number}"] if len(text["masks"]) > 1 else []
            for token in mask["tokens"]:
                share = token["probability"]
                lines.append(f"  {100 * share:5.1f} %  {bar(share)}  {token['token']}")
    return "\n".join(lines)


def bar(share: float) -> str:
    """BAR_WIDTH characters, of which this share is filled."""
    whole, rest = divmod(round(8 * BAR_WIDTH * share), 8)
    return f"{'█' * whole + EIGHTHS[rest]:{BAR_WIDTH}.{BAR_WIDTH}}"


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(lambda: print(report(parse_options(FillMaskOptions, arguments, "bert.fill_mask", EXAMPLES))))


if __name__ == "__main__":
    sys.exit(main())
