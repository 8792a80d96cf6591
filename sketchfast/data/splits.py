"""The class splits of retrieval papers, as lists, and seeded ones where a paper published none.

* "sketchy-21": Yelamarthi et al. (2018), 104 classes to train and 21 to test, chosen outside ImageNet's
  1,000; taken over by Dey et al. (2019), and so PM-JDOT's zero-shot split.
* "sketchy-25": 100 and 25, the setting of Shen et al. (2018), who drew the 25 at random and published no
  list; this is the draw of SAKE (Liu et al., 2019), which later public code shares.
* "tuberlin-30": 220 and 30, after Shen et al. (2018) too; the draw of SAKE. (PM-JDOT says only "randomly
  chosen".)
* "random-<count>-seed<seed>": a draw of our own from the classes at hand, nobody's published split.

Lists as in the public code of Lin et al. (ZSE-SBIR, 2023, github.com/buptLinfy/ZSE-SBIR,
datasets/*/zeroshot*/cname_cid*.txt). TU-Berlin's names are in the form of `tuberlin.normal_class_name`.

The unsupervised protocol draws QUERIES_PER_CLASS sketches of each class: `SketchPhotoSet.split_unsupervised`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ..ops._contract import check_integer
from .dataset import class_index

#: Sketches of each class that are queries in the unsupervised protocol (PM-JDOT section 4.2.1).
QUERIES_PER_CLASS = {"sketchy": 50, "sketchy_extended": 50, "tuberlin_extended": 10}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


#: Sketchy's 125 classes, as its folders are named.
SKETCHY_CLASSES = _words(
    """
    airplane alarm_clock ant ape apple armor axe banana bat bear bee beetle bell bench bicycle blimp bread
    butterfly cabin camel candle cannon car_(sedan) castle cat chair chicken church couch cow crab
    crocodilian cup deer dog dolphin door duck elephant eyeglasses fan fish flower frog geyser giraffe
    guitar hamburger hammer harp hat hedgehog helicopter hermit_crab horse hot-air_balloon hotdog hourglass
    jack-o-lantern jellyfish kangaroo knife lion lizard lobster motorcycle mouse mushroom owl parrot pear
    penguin piano pickup_truck pig pineapple pistol pizza pretzel rabbit raccoon racket ray rhinoceros rifle
    rocket sailboat saw saxophone scissors scorpion sea_turtle seagull seal shark sheep shoe skyscraper
    snail snake songbird spider spoon squirrel starfish strawberry swan sword table tank teapot teddy_bear
    tiger tree trumpet turtle umbrella violin volcano wading_bird wheelchair windmill window wine_bottle
    zebra
    """
)

#: Yelamarthi et al. (2018).
SKETCHY_TEST_21 = _words(
    """
    bat cabin cow dolphin door giraffe helicopter mouse pear raccoon rhinoceros saw scissors seagull
    skyscraper songbird sword tree wheelchair windmill window
    """
)

#: In the setting of Shen et al. (2018), the draw of Liu et al. (2019).
SKETCHY_TEST_25 = _words(
    """
    airplane bell butterfly camel chicken cup deer harp horse parrot pineapple ray rifle scissors snail
    squirrel swan tank teddy_bear tree umbrella volcano wheelchair windmill wine_bottle
    """
)

#: TU-Berlin's 250 classes, their names normalised.
TUBERLIN_CLASSES = _words(
    """
    airplane alarm_clock angel ant apple arm armchair ashtray axe backpack banana barn baseball_bat basket
    bathtub bear_animal bed bee beer_mug bell bench bicycle binoculars blimp book bookshelf boomerang
    bottle_opener bowl brain bread bridge bulldozer bus bush butterfly cabinet cactus cake calculator camel
    camera candle cannon canoe car_sedan carrot castle cat cell_phone chair chandelier church cigarette
    cloud comb computer_monitor computer_mouse couch cow crab crane_machine crocodile crown cup diamond dog
    dolphin donut door door_handle dragon duck ear elephant envelope eye eyeglasses face fan feather
    fire_hydrant fish flashlight floor_lamp flower_with_stem flying_bird flying_saucer foot fork frog
    frying_pan giraffe grapes grenade guitar hamburger hammer hand harp hat head head_phones hedgehog
    helicopter helmet horse hot_air_balloon hot_dog hourglass house human_skeleton ice_cream_cone ipod
    kangaroo key keyboard knife ladder laptop leaf lightbulb lighter lion lobster loudspeaker mailbox
    megaphone mermaid microphone microscope monkey moon mosquito motorbike mouse_animal mouth mug mushroom
    nose octopus owl palm_tree panda paper_clip parachute parking_meter parrot pear pen penguin
    person_sitting person_walking piano pickup_truck pig pigeon pineapple pipe_for_smoking pizza
    potted_plant power_outlet present pretzel pumpkin purse rabbit race_car radio rainbow revolver rifle
    rollerblades rooster sailboat santa_claus satellite satellite_dish saxophone scissors scorpion
    screwdriver sea_turtle seagull shark sheep ship shoe shovel skateboard skull skyscraper snail snake
    snowboard snowman socks space_shuttle speed_boat spider sponge_bob spoon squirrel standing_bird stapler
    strawberry streetlight submarine suitcase sun suv swan sword syringe t_shirt table tablelamp teacup
    teapot teddy_bear telephone tennis_racket tent tiger tire toilet tomato tooth toothbrush tractor
    traffic_light train tree trombone trousers truck trumpet tv umbrella van vase violin walkie_talkie wheel
    wheelbarrow windmill wine_bottle wineglass wrist_watch zebra
    """
)

#: In the setting of Shen et al. (2018), the draw of Liu et al. (2019).
TUBERLIN_TEST_30 = _words(
    """
    ant banana bottle_opener brain bread bridge bus canoe fan frying_pan horse hot_air_balloon laptop
    lighter parachute penguin pizza rollerblades shoe snowboard space_shuttle streetlight suitcase t_shirt
    table teacup telephone tractor trombone windmill
    """
)

#: The published splits: their test classes.
TEST_CLASSES = {
    "sketchy-21": SKETCHY_TEST_21,
    "sketchy-25": SKETCHY_TEST_25,
    "tuberlin-30": TUBERLIN_TEST_30,
}
_RANDOM = re.compile(r"random-(\d+)-seed(\d+)")


def zero_shot_test_classes(split: str, class_names: Sequence[str]) -> list[str]:
    """The test classes of the split named `split` (see this module's head), sorted.

    class_names: those at hand, which must hold all of them; a random split draws from them, whatever their
    order. Raises ValueError for an unknown split, or one of another data set.
    """
    if split in TEST_CLASSES:
        for name in TEST_CLASSES[split]:
            class_index(class_names, name)
        return list(TEST_CLASSES[split])
    match = _RANDOM.fullmatch(split)
    if match is None:
        raise ValueError(
            f"split must be one of {', '.join(TEST_CLASSES)} or random-<count>-seed<seed>, got {split!r}"
        )
    return random_test_classes(class_names, int(match[1]), int(match[2]))


def random_test_classes(class_names: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """`count` of the classes drawn by `seed`, sorted; the draw does not depend on their order."""
    ordered = sorted(set(class_names))
    count = check_integer("count", count, 1, len(ordered) - 1)
    rng = np.random.default_rng(check_integer("seed", seed, 0))
    return sorted(ordered[i] for i in rng.choice(len(ordered), count, replace=False))
