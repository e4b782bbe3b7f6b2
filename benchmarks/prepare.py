"""How fast text becomes samples: data.prepare, tokenizers alone, and the algorithm of BERT's create_pretraining_data.

    python benchmarks/prepare.py --input wikitext-2-valid.txt --format wikitext --vocab vocab.txt --json result.json
    python benchmarks/prepare.py        # on the prose that Python brings, with a vocabulary trained on it

All take the same text, in turns in one process; medians are reported. NVIDIA's own program is not part of this project:
`peer` is its algorithm written anew, with a tokenizer in Python, token lists and loops over tokens, as there.
`peer_fast` has the text tokenized by `tokenizers`, which NVIDIA's does not do: its time is that of making the samples.
The program itself took 6.4 s on 2 cores for wikitext-2-valid at 128 tokens, 20 masked, 5 duplicates.
"""

import os
import random
import string
import sys
import tempfile
import time
import unicodedata

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import h5py
import numpy as np
import tokenizers
from tqdm import tqdm

from benchmarks.report import make_parser, median, print_table, write_json
from bert.text import count_of
from data.prepare import PrepareOptions, prepare
from data.preparing.corpus import FORMATS, documents
from data.preparing.finding import find_files
from data.preparing.formats import with_formats
from data.preparing.vocab_training import train_vocab
from data.tokenizer import Vocabulary, make_tokenizer, read_vocab

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


def peer(texts, vocab, output, fast):
    """Writes the samples of documents (lists of lines) to an HDF5 file like NVIDIA's; returns how many there are."""
    rng = random.Random(42)
    lines = [line for text in texts for line in text]
    if fast:
        encodings = make_tokenizer(Vocabulary(vocab)).encode_batch(lines, add_special_tokens=False)
        encoded = (encoding.tokens for encoding in encodings)
    else:
        known = set(vocab)
        encoded = (python_tokens(line, known) for line in lines)
    documents = [[sentence for sentence in (next(encoded) for _ in text) if sentence] for text in texts]
    documents = [document for document in documents if document]
    rng.shuffle(documents)
    ids = {token: number for number, token in enumerate(vocab)}
    instances = []
    for _ in range(DUPLICATES):
        for index in range(len(documents)):
            instances += peer_instances(documents, index, vocab, rng)
    rng.shuffle(instances)
    peer_write(instances, ids, output)
    return len(instances)


def python_tokens(line, known):
    """BERT's lower-case tokenizer as its programs have it: character by character, then the longest pieces first."""
    cleaned = []
    for character in line:
        is_control = character not in "\t\n\r" and unicodedata.category(character) in ("Cc", "Cf")
        if is_control or ord(character) in (0, 0xFFFD):
            continue
        cjk = any(first <= ord(character) <= last for first, last in CJK)
        cleaned.append(f" {character} " if cjk else " " if character.isspace() else character)
    pieces = []
    for word in "".join(cleaned).split():
        letters = unicodedata.normalize("NFD", word.lower())
        word = "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")
        for part in split_punctuation(word):
            pieces.extend(longest_pieces(part, known))
    return pieces


def split_punctuation(word):
    parts, begins = [], True
    for letter in word:
        if letter in string.punctuation or unicodedata.category(letter).startswith("P"):
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


def peer_instances(all_documents, index, vocab, rng):
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
            instances.append((*peer_mask(sample, vocab, rng), types, is_random))
            gathered, size = [], 0
        at += 1
    return instances


def peer_mask(sample, vocab, rng):
    candidates = [place for place, token in enumerate(sample) if token not in ("[CLS]", "[SEP]")]
    rng.shuffle(candidates)
    output, chosen = list(sample), []
    for place in candidates[: min(MASKS, max(1, int(round(len(sample) * 0.15))))]:
        if rng.random() < 0.8:
            output[place] = "[MASK]"
        elif rng.random() >= 0.5:
            output[place] = vocab[rng.randint(0, len(vocab) - 1)]
        chosen.append((place, sample[place]))
    chosen.sort()
    return output, chosen


def peer_write(instances, ids, output):
    count = len(instances)
    columns = dict.fromkeys(("input_ids", "input_mask", "segment_ids"), LENGTH)
    columns.update(dict.fromkeys(("masked_lm_positions", "masked_lm_ids"), MASKS))
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


def timed(work, *arguments, **options):
    begun = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - begun


WAYS = {
    "prepare": "data.prepare, to shards",
    "tokenizers": "tokenizers alone, the text once",
    "peer": "create_pretraining_data's algorithm, re-implemented",
    "peer_fast": "the same, tokenized by tokenizers",
}


def measure(options, texts, tokens):
    """Seconds of each way, in rounds, and the samples that it makes."""
    lines = [line for text in texts for line in text]
    seconds, samples = {name: [] for name in WAYS}, {}
    with tempfile.TemporaryDirectory() as folder:
        vocab = os.path.join(folder, "vocab.txt")
        with open(vocab, "w", encoding="utf-8") as file:
            file.writelines(token + "\n" for token in tokens)
        sizes = {"sequence_length": LENGTH, "mask_tokens": MASKS, "duplicates": DUPLICATES}

        def ours(number):
            output = os.path.join(folder, f"set-{number}")
            settings = PrepareOptions(options.input, output, options.format, vocab=vocab, **sizes)
            samples["prepare"] = prepare(settings, progress=False).train_samples

        def theirs(name):
            samples[name] = peer(texts, tokens, os.path.join(folder, "peer.h5"), name == "peer_fast")

        for number in tqdm(range(options.rounds + 1), disable=None):
            now = {"prepare": timed(ours, number)}
            now.update((name, timed(theirs, name)) for name in ("peer", "peer_fast"))
            encode = make_tokenizer(Vocabulary(tokens)).encode_batch_fast
            now["tokenizers"] = timed(encode, lines, add_special_tokens=False)
            if number:  # the first round warms the page cache and the imports
                for name, value in now.items():
                    seconds[name].append(value)
    return seconds, samples


def main():
    parser = make_parser(__doc__)
    text = "text as data.prepare takes it (default: Python's own prose)"
    parser.add_argument("--input", nargs="+", default=["python"], help=text)
    parser.add_argument("--format", default="lines", choices=FORMATS, help="of the text (default: %(default)s)")
    parser.add_argument(
        "--vocab", help="the vocabulary; by default one of 30,522 tokens is trained, outside the timing"
    )
    parser.add_argument("--rounds", type=int, default=5, help="in which the ways take turns (default: %(default)s)")
    options = parser.parse_args()
    files = with_formats(find_files(options.input), options.format, "utf-8", "text")
    texts = [document.lines for document in documents(files)]
    megabytes = sum(len(line.encode("utf-8")) + 1 for text in texts for line in text) / 1e6
    vocabulary = read_vocab(options.vocab) if options.vocab else train_vocab(lambda: iter(texts), 30522)
    seconds, samples = measure(options, texts, vocabulary.tokens)
    medians = {name: median(seconds[name]) for name in WAYS}
    ours, rows = medians["prepare"], []
    result = {"megabytes": megabytes, "duplicates": DUPLICATES, "rounds": seconds}
    for name, label in WAYS.items():
        rate = megabytes / medians[name]
        result[name] = {"seconds": medians[name], "megabytes_per_second": rate, "samples": samples.get(name)}
        rows.append([label, f"{medians[name]:.2f}", f"{rate:.2f}", f"{medians[name] / ours:.2f}"])
    result["times_the_reimplementation"] = medians["peer"] / ours
    result["times_the_reimplementation_with_tokenizers"] = medians["peer_fast"] / ours
    result["share_of_tokenizers"] = medians["tokenizers"] / ours
    sizes = f"{LENGTH} tokens, {MASKS} masked, {DUPLICATES} duplicates"
    print(f"{megabytes:.2f} MB of text, {sizes}; medians of {count_of(options.rounds, 'round')}")
    print_table(["", "s", "MB/s", "data.prepare is faster by"], rows)
    versions = {"tokenizers": tokenizers.__version__, "h5py": h5py.__version__, "numpy": np.__version__}
    write_json(options.json, result, **versions)


if __name__ == "__main__":
    main()
