"""How fast text becomes samples: `data.prepare`, `tokenizers` alone, and the algorithm of BERT's
create_pretraining_data.

    python benchmarks/prepare.py --input wikitext-2-valid.txt --format wikitext --vocab vocab.txt --json result.json
    python benchmarks/prepare.py        # on the prose that Python brings, with a vocabulary trained on it

All take the same text, in turns in one process; medians are reported. NVIDIA's own program is not part of this project:
`peer` is its algorithm written anew, with a tokenizer in Python, token lists and loops over tokens, as there.
`peer_fast` is the same with the text tokenized by `tokenizers`, which NVIDIA's does not do: what is left is the making
of samples alone. The program itself took 6.4 s on 2 cores for wikitext-2-valid at 128 tokens, 20 masked, 5 duplicates.
"""

import argparse
import os
import random
import sys
import tempfile
import time
import unicodedata

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import h5py
import numpy as np
import tokenizers
from tqdm import tqdm

from benchmarks.report import median, print_table, write_json
from data.prepare import PrepareOptions, prepare
from data.preparing.corpus import FORMATS, documents, find_files
from data.tokenizer import make_tokenizer, read_vocab, train_vocab

LENGTH, MASKS, DUPLICATES = 128, 20, 5
CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def peer(texts, words, output, fast):
    """Documents (lists of lines) to an HDF5 file as NVIDIA's; gives the number of samples."""
    rng = random.Random(42)
    lines = [line for text in texts for line in text]
    if fast:
        encoded = (encoding.tokens for encoding in make_tokenizer(words).encode_batch(lines, add_special_tokens=False))
    else:
        known = set(words)
        encoded = (python_tokens(line, known) for line in lines)
    tokens = [[sentence for sentence in (next(encoded) for _ in text) if sentence] for text in texts]
    tokens = [document for document in tokens if document]
    rng.shuffle(tokens)
    ids = {word: number for number, word in enumerate(words)}
    instances = [
        instance
        for _ in range(DUPLICATES)
        for index in range(len(tokens))
        for instance in peer_instances(tokens, index, words, rng)
    ]
    rng.shuffle(instances)
    peer_write(instances, ids, output)
    return len(instances)


def python_tokens(line, known):
    """BERT's lower-case tokenizer as its programs have it: character by character, then the longest pieces first."""
    cleaned = []
    for character in line:
        if ord(character) in (0, 0xFFFD) or (
            character not in "\t\n\r" and unicodedata.category(character) in ("Cc", "Cf")
        ):
            continue
        cjk = any(first <= ord(character) <= last for first, last in CJK)
        cleaned.append(f" {character} " if cjk else " " if character.isspace() else character)
    pieces = []
    for word in "".join(cleaned).split():
        word = "".join(
            letter for letter in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(letter) != "Mn"
        )
        for part in split_punctuation(word):
            pieces.extend(longest_pieces(part, known))
    return pieces


def split_punctuation(word):
    parts, begins = [], True
    for letter in word:
        code = ord(letter)
        if (
            33 <= code <= 47
            or 58 <= code <= 64
            or 91 <= code <= 96
            or 123 <= code <= 126
            or unicodedata.category(letter).startswith("P")
        ):
            parts.append([letter])
            begins = True
        else:
            if begins:
                parts.append([])
            begins = False
            parts[-1].append(letter)
    return ["".join(part) for part in parts]


def longest_pieces(word, known):
    pieces, start = [], 0
    while start < len(word) <= 100:
        end = len(word)
        while end > start:
            piece = ("##" if start else "") + word[start:end]
            if piece in known:
                break
            end -= 1
        if end == start:
            return ["[UNK]"]
        pieces.append(piece)
        start = end
    return pieces or ["[UNK]"]


def peer_instances(all_documents, index, words, rng):
    """Pairs of segments of one document: sentences are gathered up to a target length, and split at a random one."""
    document, longest = all_documents[index], LENGTH - 3
    instances, gathered, size = [], [], 0
    target = rng.randint(2, longest) if rng.random() < 0.1 else longest
    at = 0
    while at < len(document):
        gathered.append(document[at])
        size += len(document[at])
        if at == len(document) - 1 or size >= target:
            split = rng.randint(1, len(gathered) - 1) if len(gathered) > 1 else 1
            first = [token for sentence in gathered[:split] for token in sentence]
            second, is_random = [], len(gathered) == 1 or rng.random() < 0.5
            if is_random:
                other = index
                for _ in range(10):
                    other = rng.randint(0, len(all_documents) - 1)
                    if other != index:
                        break
                for sentence in all_documents[other][rng.randint(0, len(all_documents[other]) - 1) :]:
                    second.extend(sentence)
                    if len(second) >= target - len(first):
                        break
                at -= len(gathered) - split
            else:
                second = [token for sentence in gathered[split:] for token in sentence]
            while len(first) + len(second) > longest:
                trimmed = first if len(first) > len(second) else second
                if rng.random() < 0.5:
                    del trimmed[0]
                else:
                    trimmed.pop()
            sample = ["[CLS]"] + first + ["[SEP]"] + second + ["[SEP]"]
            types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
            instances.append((*peer_mask(sample, words, rng), types, is_random))
            gathered, size = [], 0
        at += 1
    return instances


def peer_mask(sample, words, rng):
    candidates = [place for place, token in enumerate(sample) if token not in ("[CLS]", "[SEP]")]
    rng.shuffle(candidates)
    output, chosen = list(sample), []
    for place in candidates[: min(MASKS, max(1, int(round(len(sample) * 0.15))))]:
        if rng.random() < 0.8:
            output[place] = "[MASK]"
        elif rng.random() >= 0.5:
            output[place] = words[rng.randint(0, len(words) - 1)]
        chosen.append((place, sample[place]))
    chosen.sort()
    return output, chosen


def peer_write(instances, ids, output):
    count = len(instances)
    columns = {
        "input_ids": LENGTH,
        "input_mask": LENGTH,
        "segment_ids": LENGTH,
        "masked_lm_positions": MASKS,
        "masked_lm_ids": MASKS,
    }
    arrays = {name: np.zeros((count, width), np.int32) for name, width in columns.items()}
    labels = np.zeros(count, np.int8)
    for row, (tokens, chosen, types, is_random) in enumerate(instances):
        arrays["input_ids"][row, : len(tokens)] = [ids[token] for token in tokens]
        arrays["input_mask"][row, : len(tokens)] = 1
        arrays["segment_ids"][row, : len(tokens)] = types
        arrays["masked_lm_positions"][row, : len(chosen)] = [place for place, _ in chosen]
        arrays["masked_lm_ids"][row, : len(chosen)] = [ids[token] for _, token in chosen]
        labels[row] = is_random
    with h5py.File(output, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, compression="gzip", dtype="i4")
        file.create_dataset("next_sentence_labels", data=labels, compression="gzip")


def timed(work):
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", default=["python"], help="text as of data.prepare (default: Python's own prose)"
    )
    parser.add_argument("--format", default="lines", choices=FORMATS, help="of the text (default lines)")
    parser.add_argument("--vocab", help="the vocabulary; without it one of 30,522 words is trained, outside the timing")
    parser.add_argument("--rounds", type=int, default=5, help="of all, in turns (default 5)")
    parser.add_argument("--json", metavar="FILE", help="where to write the result too")
    options = parser.parse_args()
    texts = [document.lines for document in documents(find_files(options.input), options.format)]
    lines = [line for text in texts for line in text]
    megabytes = sum(len(line.encode("utf-8")) + 1 for line in lines) / 1e6
    words = read_vocab(options.vocab) if options.vocab else train_vocab(lambda: iter(texts), 30522)
    seconds, samples = {"prepare": [], "tokenizers": [], "peer": [], "peer_fast": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        vocab = os.path.join(folder, "vocab.txt")
        with open(vocab, "w", encoding="utf-8") as file:
            file.writelines(word + "\n" for word in words)

        def ours(number):
            output, sizes = os.path.join(folder, f"set-{number}"), {"sequence_length": LENGTH, "mask_tokens": MASKS}
            settings = PrepareOptions(
                options.input, output, options.format, vocab=vocab, duplicates=DUPLICATES, **sizes
            )
            samples["prepare"] = prepare(settings, progress=False).train_samples

        def theirs(name):
            samples[name] = peer(texts, words, os.path.join(folder, "peer.h5"), name == "peer_fast")

        for number in tqdm(range(options.rounds + 1), disable=None):
            now = {
                "prepare": timed(lambda: ours(number)),
                "peer": timed(lambda: theirs("peer")),
                "peer_fast": timed(lambda: theirs("peer_fast")),
            }
            tokenizer = make_tokenizer(words)
            now["tokenizers"] = timed(lambda: tokenizer.encode_batch_fast(lines, add_special_tokens=False))
            if number:  # the first round warms the page cache and the imports
                for name, value in now.items():
                    seconds[name].append(value)
    result = {
        name: {
            "seconds": median(values),
            "megabytes_per_second": megabytes / median(values),
            "samples": samples.get(name),
        }
        for name, values in seconds.items()
    }
    result.update(
        megabytes=megabytes,
        duplicates=DUPLICATES,
        rounds=seconds,
        times_the_reimplementation=result["peer"]["seconds"] / result["prepare"]["seconds"],
        times_the_reimplementation_with_tokenizers=result["peer_fast"]["seconds"] / result["prepare"]["seconds"],
        share_of_tokenizers=result["tokenizers"]["seconds"] / result["prepare"]["seconds"],
    )
    print(
        f"{megabytes:.2f} MB of text, {LENGTH} tokens, {MASKS} masked, {DUPLICATES} duplicates; medians of "
        f"{options.rounds} rounds"
    )
    print_table(
        ["", "s", "MB/s"],
        [
            [what, f"{result[name]['seconds']:.2f}", f"{result[name]['megabytes_per_second']:.2f}"]
            for name, what in (
                ("prepare", "data.prepare, to shards"),
                ("tokenizers", "tokenizers alone, the text once"),
                ("peer", "create_pretraining_data's algorithm, re-implemented"),
                ("peer_fast", "the same, tokenized by tokenizers"),
            )
        ],
    )
    print(
        f"data.prepare is {result['times_the_reimplementation']:.1f} times the re-implementation, "
        f"{result['times_the_reimplementation_with_tokenizers']:.1f} times it with tokenizers; "
        f"{result['share_of_tokenizers']:.2f} of tokenizers' MB/s"
    )
    write_json(options.json, result, tokenizers=tokenizers.__version__, h5py=h5py.__version__, numpy=np.__version__)


if __name__ == "__main__":
    main()
