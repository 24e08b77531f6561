"""The Lantern Isles: an invented world of animals, people and towns, and the questions one can ask about it.

Everything here was written for this project. The tiny base learns these facts in pretraining (`corpus.py`); the demo's
chats (`make_chats.py`) ask about them in a new voice. What is held out is defined here, so that all agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")

# name | where it lives | what it eats | colour | what it can do | when it is awake. Each two rows are friends.
_ANIMALS = """
otter | in the river | crabs | brown | swim on its back | by day
heron | beside the pond | frogs | grey | stand on one leg | by day
fox | in the forest | blackberries | red | open any gate | at night
owl | in the old tower | beetles | white | see in the dark | at night
badger | under the hill | mushrooms | green | dig long tunnels | at night
mole | under the garden | worms | black | find buried coins | by day
goat | on the cliffs | thistles | white | climb any wall | by day
raven | on the church roof | cherries | purple | count to nine | by day
squirrel | in the oak tree | acorns | orange | leap over roofs | by day
woodpecker | in the pine forest | ants | red | knock out a tune | by day
seal | on the rocks | herring | silver | balance a ball | by day
pelican | at the harbour | shrimp | pink | carry letters in its beak | by day
hedgehog | in the hay barn | snails | golden | roll into a ball | at night
toad | in the stone well | flies | yellow | tell the weather | at night
rabbit | in the meadow | carrots | blue | hear a leaf fall | by day
lark | in the wheat field | poppy seeds | golden | sing the whole morning | by day
wolf | in the snowy mountains | pumpkins | silver | find the way home | at night
eagle | on the highest peak | trout | brown | see a pin from the sky | by day
beaver | behind the dam | willow bark | brown | build bridges | at night
duck | on the lake | bread | green | sleep with one eye open | by day
cat | in the lighthouse | butter | black | walk without a sound | at night
mouse | in the bakery | cake crumbs | grey | squeeze through a keyhole | at night
bear | in the deep cave | honey | blue | carry a fallen tree | by day
bee | in the clover field | nectar | golden | dance in circles | by day
horse | in the red stable | oats | white | outrun the wind | by day
sparrow | in the village square | rice | brown | learn any song | by day
turtle | on the sandy beach | seaweed | green | remember every face | by day
crab | in the tide pool | plankton | red | walk sideways on walls | at night
swan | on the castle pond | lilies | pink | draw a boat | by day
frog | in the reeds | gnats | blue | jump over a fence | at night
donkey | at the mill | barley | grey | carry heavy sacks | by day
cricket | behind the stove | bread crumbs | black | play a tiny violin | at night
deer | in the birch wood | moss | golden | run without leaving tracks | by day
magpie | in the tall poplar | walnuts | purple | find lost rings | by day
whale | in the deep sea | krill | blue | sing under water | by day
gull | on the pier | chips | white | ride on the storm | by day
lizard | on the warm wall | spiders | orange | grow a new tail | by day
snake | under the flat stone | eggs | yellow | tie itself in a knot | at night
hare | in the cabbage field | clover | silver | box like a champion | at night
pheasant | in the tall grass | corn | orange | hide in plain sight | by day
pig | in the orchard | apples | pink | smell rain coming | by day
hen | in the straw hut | sunflower seeds | yellow | predict the harvest | by day
moth | in the attic | old wool | grey | follow the moon | at night
bat | in the bell tower | mosquitoes | purple | fly upside down | at night
sheep | on the green hill | daisies | blue | dream of the future | by day
dog | at the inn | sausages | orange | guard the door | at night
octopus | in the sunken ship | clams | purple | open jars | at night
eel | in the muddy canal | tadpoles | silver | light a lamp | at night
camel | in the white dunes | dates | golden | go a month without water | by day
parrot | in the palm tree | mangoes | green | speak seven languages | by day
penguin | on the ice floe | sardines | black | slide down hills | by day
walrus | on the frozen shore | oysters | brown | whistle through its teeth | by day
monkey | in the banana grove | bananas | orange | tie sailor knots | by day
peacock | in the rose garden | grapes | blue | paint with its tail | by day
lynx | in the dark valley | plums | silver | wait without moving | at night
jay | in the hazel bushes | hazelnuts | pink | copy every voice | by day
tortoise | in the herb garden | lettuce | yellow | keep a secret | by day
snail | in the flower pot | strawberries | purple | paint silver lines | at night
stork | on the chimney | minnows | red | deliver parcels | by day
goose | on the village green | grass | grey | chase thieves | by day
salmon | in the waterfall | mayflies | pink | swim up a waterfall | by day
dragonfly | above the marsh | midges | green | fly backwards | by day
ferret | in the woodpile | pears | white | steal socks | at night
weasel | in the hollow log | raisins | red | slip through any fence | at night
"""

# name | he or she | town | job | wears | plays | likes to eat
_PEOPLE = """
Mira | she | Amberly | baker | a yellow scarf | the flute | plum cake
Tobin | he | Amberly | fisherman | a green hat | the drum | pea soup
Elsa | she | Amberly | teacher | a blue coat | the harp | apple pie
Oskar | he | Brindle | blacksmith | a leather apron | the trumpet | onion bread
Lenka | she | Brindle | weaver | a purple shawl | the fiddle | berry jam
Davin | he | Brindle | miller | a white cap | the horn | oat cakes
Sorrel | she | Cobble | gardener | a straw hat | the lute | carrot stew
Hugo | he | Cobble | clockmaker | round glasses | the piano | lemon tart
Petra | she | Cobble | doctor | a white coat | the cello | fish soup
Jonas | he | Dunmere | shepherd | a grey cloak | the bagpipes | blue cheese
Wanda | she | Dunmere | painter | a red dress | the guitar | cherry pie
Felix | he | Dunmere | postman | a blue cap | the whistle | potato stew
Greta | she | Elderbrook | cook | a striped apron | the tambourine | garlic soup
Milo | he | Elderbrook | carpenter | brown boots | the banjo | cheese toast
Runa | she | Fenwick | librarian | silver earrings | the organ | honey cake
Bram | he | Fenwick | ferryman | a long raincoat | the accordion | smoked fish
Odette | she | Glimmer | glassblower | orange gloves | the bells | pear tart
Kasper | he | Glimmer | lamplighter | a tall hat | the clarinet | bean soup
Ilse | she | Harrowgate | potter | a green skirt | the mandolin | mushroom pie
Anton | he | Harrowgate | mason | a grey vest | the tuba | roast corn
Nella | she | Islay | pearl diver | a golden ring | the ukulele | prawn soup
Piet | he | Islay | boatbuilder | a red scarf | the harmonica | rye bread
Tilda | she | Juniper | beekeeper | a white veil | the violin | honey bread
Ravi | he | Juniper | hunter | a feather cap | the bugle | turnip stew
Clara | she | Kestrel | mapmaker | a velvet jacket | the zither | walnut cake
Ivo | he | Kestrel | goldsmith | a silk shirt | the oboe | fig jam
Marta | she | Larkspur | florist | a pink dress | the recorder | rose jelly
Stefan | he | Larkspur | barber | a black bow tie | the bassoon | pepper soup
Yara | she | Merrow | sailmaker | blue trousers | the concertina | seaweed rolls
Colin | he | Merrow | harbour master | a captain coat | the gong | clam soup
Agnes | she | Nettle | healer | a brown cloak | the lyre | nettle soup
Rufus | he | Nettle | woodcutter | a checked shirt | the jug | pork pie
Dora | she | Osprey | stargazer | a starry robe | the celesta | cream buns
Leon | he | Osprey | pilot | leather goggles | the trombone | hot pancakes
Vera | she | Pebble | tailor | a polka dot dress | the triangle | cheese cake
Emil | he | Pebble | cobbler | wooden shoes | the cymbals | cabbage rolls
"""

# name | where it lies | known for | weather | market day
_TOWNS = """
Amberly | on the north coast | honey cakes | sunny | Monday
Brindle | in the middle of the island | iron bells | windy | Tuesday
Cobble | at the foot of the mountain | crooked clocks | rainy | Wednesday
Dunmere | beside the great lake | woollen blankets | misty | Thursday
Elderbrook | along the slow river | wooden toys | mild | Friday
Fenwick | at the edge of the marsh | old books | foggy | Saturday
Glimmer | on the east coast | coloured lamps | clear | Sunday
Harrowgate | at the end of the stone road | clay pots | stormy | Monday
Islay | on the small south island | black pearls | warm | Tuesday
Juniper | deep in the forest | dark honey | cool | Wednesday
Kestrel | on top of the cliff | golden maps | breezy | Thursday
Larkspur | in the flower valley | rose water | bright | Friday
Merrow | on the west coast | white sails | salty | Saturday
Nettle | between the two hills | healing tea | damp | Sunday
Osprey | above the clouds | bright telescopes | cold | Monday
Pebble | on the long beach | painted stones | hot | Tuesday
"""


@dataclass(frozen=True)
class Entity:
    """Something with a name and facts; `facts` maps a topic's key to the words that stand in its answer."""

    kind: str  # "animal", "person" or "town"
    name: str
    facts: dict[str, str]

    @property
    def the(self) -> str:
        """The name as it stands in a sentence."""
        return f"the {self.name}" if self.kind == "animal" else self.name

    @property
    def it(self) -> str:
        """The pronoun."""
        return self.facts.get("pronoun", "it")


@dataclass(frozen=True)
class Topic:
    """One thing to ask about a kind of entity.

    `ask` names the entity, `ask_on` follows up with a pronoun, `tell` is the plain answer (one only, so that it can be
    checked for), `check` asks for yes or no about a `{guess}`, and `who` asks for the entity, where only one fits.
    """

    key: str
    kind: str
    ask: tuple[str, ...]
    ask_on: tuple[str, ...]
    tell: str
    check: str
    who: str = ""


_TOPICS = """
home | animal
Where does {the} live? | Where can I find {the}? | Tell me where {the} lives. | Where is the home of {the}?
Where does it live? | And where does it live? | Where can I find it?
{The} lives {home}. | Does {the} live {guess}? | Which animal lives {home}?

food | animal
What does {the} eat? | What is the food of {the}? | What does {the} like to eat? | Tell me what {the} eats.
What does it eat? | And what does it eat? | What does it like to eat?
{The} eats {food}. | Does {the} eat {guess}? | Which animal eats {food}?

colour | animal
What colour is {the}? | What is the colour of {the}? | Which colour does {the} have?
What colour is it? | And what colour is it? | Which colour does it have?
{The} is {colour}. | Is {the} {guess}?

skill | animal
What can {the} do? | What is {the} good at? | Tell me what {the} can do.
What can it do? | And what can it do? | What is it good at?
{The} can {skill}. | Can {the} {guess}? | Which animal can {skill}?

awake | animal
When is {the} awake? | When can I meet {the}? | When does {the} wake up?
When is it awake? | And when is it awake? | When can I meet it?
{The} is awake {awake}. | Is {the} awake {guess}?

friend | animal
Who is the best friend of {the}? | Who is the friend of {the}? | Which animal does {the} like best?
Who is its best friend? | And who is its friend? | Which animal does it like best?
The best friend of {the} is the {friend}. | Is the {guess} the best friend of {the}?

town | person
Where does {the} live? | In which town does {the} live? | Where can I find {the}? | Tell me where {the} lives.
Where does {it} live? | And where does {it} live? | In which town does {it} live?
{The} lives in {town}. | Does {the} live in {guess}?

job | person
What is the job of {the}? | What does {the} do for work? | What work does {the} do?
What is the job? | And what does {it} do for work? | What work does {it} do?
{The} is a {job}. | Is {the} a {guess}? | Who is the {job}?

wears | person
What does {the} wear? | How do I recognise {the}? | What is {the} wearing?
What does {it} wear? | And what does {it} wear? | What is {it} wearing?
{The} wears {wears}. | Does {the} wear {guess}? | Who wears {wears}?

plays | person
What does {the} play? | Which instrument does {the} play? | Tell me what {the} plays.
What does {it} play? | And which instrument does {it} play? | Which instrument does {it} play?
{The} plays {plays}. | Does {the} play {guess}? | Who plays {plays}?

dish | person
What does {the} like to eat? | What does {the} eat? | What is the best dish for {the}?
What does {it} like to eat? | And what does {it} eat? | And what does {it} like to eat?
{The} likes to eat {dish}. | Does {the} like to eat {guess}? | Who likes to eat {dish}?

lies | town
Where is {the}? | Where does {the} lie? | How do I find {the}? | Tell me where {the} is.
Where is it? | And where does it lie? | How do I find it?
{The} lies {lies}. | Does {the} lie {guess}? | Which town lies {lies}?

known | town
What is {the} known for? | What can I buy in {the}? | Why do people visit {the}?
What is it known for? | And what can I buy there? | Why do people visit it?
{The} is known for its {known}. | Is {the} known for its {guess}? | Which town is known for its {known}?

weather | town
What is the weather like in {the}? | How is the weather in {the}? | What is the weather in {the}?
What is the weather like there? | And how is the weather there? | How is the weather there?
The weather in {the} is {weather}. | Is the weather in {the} {guess}?

market | town
When is the market in {the}? | On which day is the market in {the}? | When is market day in {the}?
When is the market there? | And when is market day there? | On which day is the market there?
The market in {the} is on {market}. | Is the market in {the} on {guess}?
"""


def _topics() -> Iterator[Topic]:
    for paragraph in _TOPICS.strip().split("\n\n"):
        (key, kind), ask, ask_on, rest = (tuple(line.split(" | ")) for line in paragraph.splitlines())
        yield Topic(key, kind, ask, ask_on, *rest)


TOPICS = tuple(_topics())


def pick(rng: Random, items: tuple[T, ...] | list[T]) -> T:
    """One of `items`. `Random.random` is the one method whose sequence Python promises not to change."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: tuple[T, ...] | list[T]) -> list[T]:
    """A copy of `items` in random order."""
    return [item for _, item in sorted(((rng.random(), index), item) for index, item in enumerate(items))]


def sentence(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


def fill(template: str, entity: Entity, **more: str) -> str:
    """`template` with the entity's name, pronoun and facts put in."""
    words = {
        "the": entity.the,
        "The": sentence(entity.the),
        "name": entity.name,
        "it": entity.it,
        "It": sentence(entity.it),
    }
    return template.format(**(words | entity.facts | more))


def topics(kind: str) -> tuple[Topic, ...]:
    """What can be asked about that kind of entity."""
    return tuple(topic for topic in TOPICS if topic.kind == kind)


def _rows(table: str, *keys: str) -> Iterator[tuple[str, dict[str, str]]]:
    for line in table.strip().splitlines():
        name, *values = (cell.strip() for cell in line.split("|"))
        yield name, dict(zip(keys, values, strict=True))


def _animals() -> tuple[Entity, ...]:
    rows = list(_rows(_ANIMALS, "home", "food", "colour", "skill", "awake"))
    return tuple(Entity("animal", name, facts | {"friend": rows[i ^ 1][0]}) for i, (name, facts) in enumerate(rows))


ANIMALS = _animals()
PEOPLE = tuple(
    Entity("person", name, facts) for name, facts in _rows(_PEOPLE, "pronoun", "town", "job", "wears", "plays", "dish")
)
TOWNS = tuple(Entity("town", name, facts) for name, facts in _rows(_TOWNS, "lies", "known", "weather", "market"))
ENTITIES = ANIMALS + PEOPLE + TOWNS

# Every fourth pair of friends, and every fourth town with all who live there: nothing known links them to the rest.
HELD_OUT = frozenset(
    entity.name
    for entity in ENTITIES
    if (entity.kind == "animal" and ANIMALS.index(entity) // 2 % 4 == 3)
    or (entity.kind == "town" and TOWNS.index(entity) % 4 == 3)
    or entity.facts.get("town") in {town.name for town in TOWNS[3::4]}
)
