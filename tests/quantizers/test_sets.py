"""Quantisers of all bit-widths by one name."""

from __future__ import annotations

import pytest

from qratk.core.errors import ConfigurationError
from qratk.quantizers.sets import QUANTIZER_SETS, quantizer_set
from qratk.training.building import built_quantizers


@pytest.mark.parametrize("name", QUANTIZER_SETS)
def test_every_set_has_a_quantiser_for_every_bit_width(name):
    built = built_quantizers(name)
    assert sorted(built) == [2, 3, 4, 8, 16]
    assert all(bits in quantizer.supported_bits for bits, quantizer in built.items())


def test_the_default_is_what_is_taken_without_a_word():
    assert built_quantizers("default") == built_quantizers(None) == built_quantizers({})


@pytest.mark.parametrize("name", ["portable", "portable_gptq"])
def test_portable_grids_have_whole_zero_points_in_groups_that_servers_take(name):
    forms = {bits: quantizer.grid_form(bits) for bits, quantizer in built_quantizers(name).items() if bits < 16}
    assert all((form.group_size, form.whole, form.scale_dtype) == (64, True, "float16") for form in forms.values())
    assert {bits for bits, form in forms.items() if form.symmetric} == {8}


def test_a_set_is_a_copy():
    quantizer_set("portable")[8]["init_args"]["symmetric"] = False
    assert quantizer_set("portable")[8]["init_args"] == {"symmetric": True}


def test_a_name_that_is_no_set_is_told_with_those_that_are():
    with pytest.raises(
        ConfigurationError, match=r"'portabel' is no set.*default, portable, portable_gptq.*mean 'portable'"
    ):
        quantizer_set("portabel")
    with pytest.raises(ConfigurationError, match=r"'hqq' is no set.*or quantisers by bits, as in \{4: hqq\}"):
        quantizer_set("hqq")
