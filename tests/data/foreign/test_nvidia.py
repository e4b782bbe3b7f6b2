import h5py
import numpy as np
import pytest

from data.errors import InputError
from data.foreign.nvidia import open_nvidia, write_nvidia
from tests.make_samples import bert_samples


@pytest.mark.parametrize("name", ["input_ids", "input_mask", "masked_lm_positions", "masked_lm_ids"])
@pytest.mark.parametrize("shape", [(), (6,), (5, 4), (6, 4, 1)])
def test_a_file_whose_arrays_do_not_go_together_is_named(tmp_path, name, shape):
    path = str(tmp_path / "a.hdf5")
    write_nvidia(path, [bert_samples(np.random.default_rng(0), 6)])
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = np.zeros(shape, int)
    with pytest.raises(InputError, match="a.hdf5: .* has the shape .*, expected"):
        open_nvidia(path, 100)
