"""A tiny BERT and small files of made-up text to learn each task of labelled examples from."""

import csv
import json
import random

import torch
from safetensors.torch import save_file

from bert.command_line import parse_command_line
from bert.config import Config, ModelConfig
from bert.engines import make_engine
from bert.model.model import initialize
from bert.run.checkpoint import transformers_config
from bert.tasks import make_model, make_task, with_labels
from data.tokenizer import SPECIAL_TOKENS, Vocabulary, read_vocab, write_tokenizer_files

NAMES, PLACES, OTHERS = (
    ("anna", "bert", "carl", "dora"),
    ("rome", "oslo", "bonn"),
    ("the", "old", "film", "is", "in", "was", "and", "sees", "house", "of", "runs", "to"),
)
WORDS = [*SPECIAL_TOKENS, *NAMES, *PLACES, *OTHERS, "##er", "##s", ".", "?"]
EXACT = ("--training.precision", "float32", "--device", "cpu", "--training.compile", "off")
STILL = ("--model.hidden_dropout_prob", "0", "--model.attention_probs_dropout_prob", "0")
MODEL = dict(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
)


def make_bert(folder):
    """A BERT folder of random weights, whose attention and heads say different things of different tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(model=ModelConfig(vocab_size=len(WORDS), **MODEL))
    task = make_task(config)
    model = make_model(config, task)
    initialize(model, 0.3, 1)
    (folder / "config.json").write_text(json.dumps(transformers_config(config.model, model.architecture, "BertModel")))
    save_file({name: tensor.detach() for name, tensor in model.named_parameters()}, folder / "model.safetensors")
    write_tokenizer_files(str(folder), Vocabulary(WORDS))
    return str(folder)


def words_of(rng, most):
    """Random words, some of them of two tokens, some unknown, some of white space alone."""
    words = rng.choices((*NAMES, *PLACES, *OTHERS, "houses", "runner", "xyz", "\u200b"), k=rng.randint(1, most))
    return words if set(words) != {"\u200b"} else ["rome"]


def write_classification(folder, name, count, rng):
    with open(folder / f"{name}.tsv", "w") as file:
        file.write("text\tlabel\n")
        for number in range(count):
            words = [word for word in words_of(rng, 12) if word not in PLACES]
            file.write(f"{' '.join(words)} {PLACES[number % 3]}\tkind{number % 3}\n")


def write_token_classification(folder, name, count, rng):
    with open(folder / f"{name}.conll", "w") as file:
        file.write("-DOCSTART- -X- O\n\n")
        for _ in range(count):
            for word in words_of(rng, 14):
                tag = "B-PER" if word in NAMES else "B-LOC" if word in PLACES else "O"
                file.write(f"{word} X {tag}\n")
            file.write("\n")


def write_question_answering(folder, name, count, rng, answerable=0.7):
    paragraphs = []
    for number in range(count):
        words = words_of(rng, rng.choice((6, 60)))
        place, start = rng.randrange(len(words) + 1), 0
        answer = rng.choice(PLACES)
        words.insert(place, answer)
        start = sum(len(word) + 1 for word in words[:place])
        answers = [{"text": answer, "answer_start": start}] if rng.random() < answerable else []
        question = {"id": f"{name}{number}", "question": f"{' '.join(words_of(rng, 6))} ?", "answers": answers}
        paragraphs.append({"context": " ".join(words), "qas": [question]})
    (folder / f"{name}.json").write_text(json.dumps({"version": "2.0", "data": [{"paragraphs": paragraphs}]}))


def write_multiple_choice(folder, name, count, rng):
    with open(folder / f"{name}.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["", "sent1", "sent2", "ending0", "ending1", "ending2", "label"])
        for number in range(count):
            endings, right = [" ".join(words_of(rng, 6)) for _ in range(3)], rng.randrange(3)
            endings[right] += " oslo"
            table.writerow([number, " ".join(words_of(rng, 6)), " ".join(words_of(rng, 2)), *endings, right])


FILES = {
    "classification": (write_classification, "tsv", "classification.json", []),
    "token_classification": (write_token_classification, "conll", "ner.json", []),
    "question_answering": (
        *(write_question_answering, "json", "squad.json"),
        ["--task.stride", "6", "--task.max_question_tokens", "6", "--task.max_answer_tokens", "4"],
    ),
    "multiple_choice": (write_multiple_choice, "csv", "swag.json", ["--task.choices", "3"]),
}


def make_files(name, folder, train=60, dev=20, seed=0):
    """Writes files for the task of this name; returns the options of a run on them."""
    folder.mkdir(parents=True, exist_ok=True)
    write, ending, config, options = FILES[name]
    rng = random.Random(seed)
    write(folder, "train", train, rng)
    write(folder, "dev", dev, rng)
    files = ["--data.files", str(folder / f"train.{ending}"), "--data.held_out_files", str(folder / f"dev.{ending}")]
    return ["--config", config, *files, "--data.sequence_length", "24", *options]


def open_task(bert, options):
    """(config, task, examples to train on) of a run that starts from the folder `bert`."""
    config = with_labels(parse_command_line([*options, "--training.start_from", bert]))
    task = make_task(config)
    return config, task, task.read(config.data.files, read_vocab(bert), config.data)


def random_weights(model, seed=3):
    """For all parameters of a model, biases and LayerNorms too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.2 * torch.randn(parameter.shape, generator=generator) + ("LayerNorm.weight" in name)
        for name, parameter in model.named_parameters()
    }


def open_engine(config, device="cpu"):
    engine = make_engine(config, device)
    engine.load_weights(random_weights(engine.model))
    return engine
