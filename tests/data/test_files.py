import os

import pytest

from data.errors import InputError
from data.files import read_json, replacing, write_json


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = str(tmp_path / "a.json")
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        raise KeyboardInterrupt
    assert read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "content, message", [("[1]", "a.json: holds list, expected an object"), ("{", "a.json: cannot be read as JSON: .*")]
)
def test_what_is_not_a_json_object_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_json(str(tmp_path / "a.json"))
    with pytest.raises(InputError, match="gone.json: cannot be read as JSON: .*No such file"):
        read_json(str(tmp_path / "gone.json"))
