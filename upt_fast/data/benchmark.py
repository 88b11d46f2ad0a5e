"""Class names of known datasets, for benchmarks and tables: no image of them is needed."""

from __future__ import annotations

# the 100 classes of Caltech101 as the few-shot splits name them
_CALTECH101 = """
    face leopard motorbike accordion airplane anchor ant barrel bass beaver binocular bonsai brain brontosaurus
    buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier cougar_body cougar_face crab
    crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar elephant emu
    euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill headphone
    hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus mandolin
    mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid revolver
    rhino rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus
    stop_sign strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair
    wrench yin_yang
"""
CALTECH101_CLASSNAMES = _CALTECH101.split()


def bench_classnames(count: int) -> list[str]:
    """Class names for benchmarks: Caltech101's up to 100 classes, ImageNet's beyond."""
    if count <= 100:
        return CALTECH101_CLASSNAMES[:count]
    from open_clip import IMAGENET_CLASSNAMES

    if count > len(IMAGENET_CLASSNAMES):
        raise ValueError(f"count={count}; there are {len(IMAGENET_CLASSNAMES)} names")
    return list(IMAGENET_CLASSNAMES[:count])
