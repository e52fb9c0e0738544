"""diagnose tells every form of the leak from every innocent look-alike."""

import gallery
import pytest

import cbn_lab


@pytest.mark.parametrize("name", gallery.LEAKS)
def test_a_leak_is_growing_and_its_holder_is_named(name):
    build, paths = gallery.LEAKS[name]
    diagnosis = cbn_lab.diagnose(*build())
    growing = [found for found in diagnosis.findings if found.verdict == "growing"]
    assert diagnosis.verdict == "growing"
    assert {found.path for found in growing} == paths
    for found in growing:
        if found.path != gallery.UNREACHABLE:
            assert found.nodes_per_step > 0 or found.bytes_per_step > 0
        assert found.advice
        if found.nodes_per_step:
            assert found.origin.rpartition(":")[0].endswith(("gallery.py", "specimens.py"))


@pytest.mark.parametrize("name", gallery.INNOCENT)
def test_an_innocent_loop_raises_no_alarm(name):
    build, verdict = gallery.INNOCENT[name]
    assert cbn_lab.diagnose(*build()).verdict == verdict


def test_the_gallery_is_large_enough():
    assert len(gallery.LEAKS) >= 15 and len(gallery.INNOCENT) >= 8
