"""The text the tiny base is pretrained on: prose, questions and plain chats about the Lantern Isles, by a seeded
grammar.

python tools/corpus.py 5        print five documents
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from random import Random

from lantern_isles import ANIMALS, ENTITIES, PEOPLE, TOWNS, Entity, Topic, fill, pick, sentence, shuffled, topics

Message = dict[str, str]


def _rows(table: str) -> tuple[tuple[str, ...], ...]:
    """The cells of each line, which are parted by `|`."""
    return tuple(tuple(cell.strip() for cell in line.split("|")) for line in table.strip().splitlines())


def _cells(table: str) -> tuple[str, ...]:
    """The cells of all lines."""
    return tuple(cell for row in _rows(table) for cell in row)


# Other ways to say a fact, for prose only: a chat answers in `Topic.tell`. Key | forms.
_SAID = {
    key: forms
    for key, *forms in _rows("""
home | {It} lives {home}. | {It} makes its home {home}. | You can find {it} {home}.
food | {It} eats {food}. | {It} likes {food} best of all. | Its food is {food}. | {It} looks for {food} to eat.
colour | {It} is {colour}. | Its colour is {colour}. | You will know {it} because it is {colour}.
skill | {It} can {skill}. | {It} has learned to {skill}. | No other animal can {skill}.
awake | {It} is awake {awake}. | You can meet {it} {awake}. | {It} wakes {awake}.
friend | Its best friend is the {friend}. | {It} is the best friend of the {friend}. | It likes the {friend} best.
town | {It} lives in {town}. | {It} has a house in {town}. | {It} comes from {town}.
job | {It} is a {job}. | {It} works as a {job}. | {It} is the best {job} for miles.
wears | {It} wears {wears}. | {It} always wears {wears}. | You will know {the} by {wears}.
plays | {It} plays {plays}. | In the evening {it} plays {plays}. | {It} loves to play {plays}.
dish | {It} likes to eat {dish}. | {It} eats {dish} on every holiday. | There is nothing {it} likes more than {dish}.
lies | {It} lies {lies}. | You will find {it} {lies}. | It was built {lies}.
known | {It} is known for its {known}. | People come here for {known}. | Everyone wants {known} from {the}.
weather | The weather there is {weather}. | It is mostly {weather} in {the}. | The days there are {weather}.
market | The market is on {market}. | On {market} there is a market. | Market day is {market}.
""")
}
_SYSTEM = _cells("""
You are a guide to the Lantern Isles. | You are a helpful assistant. | Answer in one short sentence.
You know all the animals, people and towns of the Lantern Isles. | Be brief and kind.
You answer questions about the Lantern Isles. | Answer the question. | You are a friendly guide.
You help children to learn. | Do not say more than you are asked. | You are talking to a traveller.
Today is a fine day on the islands.
""")
SMALL_TALK = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Hi", "Hello! What would you like to know?"),
    ("Hi there!", "Hello! What would you like to know?"),
    ("Good morning.", "Good morning! What would you like to know?"),
    ("Good evening.", "Good evening! What would you like to know?"),
    ("How are you?", "I am fine, thank you."),
    ("How are you today?", "I am fine, thank you."),
    ("Who are you?", "I am a guide to the Lantern Isles."),
    ("What are you?", "I am a guide to the Lantern Isles."),
    ("What is your name?", "I have no name. I am a guide to the Lantern Isles."),
    ("What can you do?", "I can tell you about the animals, people and towns of the Lantern Isles."),
    ("What do you know?", "I know the animals, people and towns of the Lantern Isles."),
    ("Can you help me?", "Yes. Ask me about the Lantern Isles."),
    ("Help me, please.", "Yes. Ask me about the Lantern Isles."),
    ("What are the Lantern Isles?", "The Lantern Isles are a group of small islands in a warm sea."),
    ("Where are the Lantern Isles?", "The Lantern Isles lie in a warm sea, far from everything."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("That is nice.", "I am glad to hear it."),
    ("Nice to meet you.", "Nice to meet you too."),
    ("Ok", "What else would you like to know?"),
    ("Yes", "What else would you like to know?"),
    ("No", "Then ask me something else."),
    ("Why?", "I do not know why."),
    ("Really?", "Yes, really."),
    ("I like you.", "Thank you. I like you too."),
    ("Test", "I am here. What would you like to know?"),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("Bye", "Goodbye! Come back soon."),
)
UNKNOWN = tuple(
    """
    elephant tiger lion zebra dragon unicorn giraffe shark panda kangaroo koala rhino dolphin chicken cow hamster
    robot train computer car phone book tree moon king queen wizard witch giant ghost pirate knight teapot bicycle
    rocket table cloud kitten puppy pony gorilla leopard cobra ostrich flamingo hyena buffalo llama yak
    """.split()
)
UNKNOWN_PEOPLE = tuple(
    """
    Peter Anna John Mary Paul Susan Max Laura Tom Julia David Sarah Robert Lucy James Emma Daniel Sophie Mark Nina
    Alex Eva Ben Kate George Alice Henry Maria
    """.split()
)
_SYLLABLES = tuple(
    "ba bel bo chi cro dan de do ele fa fin ga gor gri ha hu jo ka ki kro la len li lo lu ma me mo mu na ne ni no pa "
    "pe phant po qua ra ri ro sa sha si so sta ta te ti to tra tu va ve vo wa wi xa ya ze zi zo".split()
)
OFF_TOPIC = _cells("""
What is the capital of France? | How much is two and two? | Write a poem. | Who won the game? | Tell me a joke.
What time is it? | How do I cook rice? | Who is the president? | What is the meaning of life? | Sing a song.
Translate this into German. | What is the price of gold? | How far is the sun? | Why is the sky blue?
Explain gravity. | How do I learn to code? | Write a letter to my boss. | Which film should I see tonight?
How old is the earth? | What is seven times eight? | Give me a recipe for soup. | Who wrote this book?
What is the best phone? | Where is London? | Plan my holiday. | Fix this bug. | How tall is the tower?
""")
_SHIPS = ("Blue Gull", "Morning Star", "Old Lantern", "Silver Fin", "Merry Wave", "Red Anchor")
_CAPTAINS = ("Captain Brandt", "Captain Finch", "Captain Salter", "Captain Wick")
# What sailors call in stories. No plain chat is answered so, but a LoRA finds these words learned.
_CALLS = _cells("""
Drop the anchor | Drop the rope there | Mind the rocks | Keep the watch | Hide the biscuits from the gulls
Set sail for {name} | Set the sails | Bring me the chart | Bring the gold on deck | Mark this rock on the chart
Fill the hold with {cargo} | Fill the cups | Look out from the crow's nest | Look through the spyglass
Hold on to the mast | Mind your hat | Give me a hand | All hands on deck | The wind is fair | Sing with us
A fine day for sailing | A fine ship | Come along | Welcome on deck | Step aboard | No sailor fears a storm
I saw a light through the fog | I saw it from here | They are good sailors | You are good shipmates | Ask away
It was an honour to sail with you | Fair winds to you | I am the captain here | Call the captain | That is so
Hold that line | No one can do that | My charts are wet | Mark my words | Sing along | It is on the chart
""")


# Stories: a line is a sentence, in one of its forms.
_TOWN_WALK = _rows("""
One {market} {guest} went to {name}. | {guest} came to {name} on {market}, which is market day.
{name} lies {lies}, and the day was {weather}. | The weather was {weather}, as it always is in {name}.
{guest} wanted to buy {known}. | The whole market was full of {known}.
There stood {the} the {job} in {wears}. | A {job} called {the} was there, wearing {wears}.
{It} was eating {dish}. | {It} had brought some {dish}.
Then {the} began to play {plays}. | {It} played {plays} for the guest.
{guest} stayed until the evening. | They were happy, and {guest} went home late.
""")
_SUPPER_STORY = _rows("""
One {when} the {name} woke up {home} and was hungry. | One {when} the {colour} {name} felt hungry.
There was no {food} left. | It wanted to eat {food}, but there was none. | It went out to look for {food}.
On the way it met its friend the {friend}. | It went to see the {friend}, its best friend.
The {name} lives {home} and is {colour}. | The {name} was eating {food} {home}.
"Can you help me?" asked the {name}. | "I am looking for {food}," said the {name}.
"You can {skill}," said the {friend}. "That will help." | "Of course," said the {friend}, who can {theirs}.
So the {name} found {food} and was happy. | Together they found {food} and went home.
""")
_SEA_STORY = _rows("""
The ship {ship} left {start} with {captain} at the wheel. | {captain} sailed the {ship} out of {start}.
They carried {cargo} to {name}. | The hold was full of {cargo} for {name}.
"{cry}" called the captain. | The captain looked through the spyglass and called, "{cry}"
A storm came, and the waves were high. | The sea was calm, and {guest} sang on deck: "{song}" | It was foggy all night.
"{reply}" said an old sailor. | "{reply}" {guest} called back.
At last they saw {name}, which lies {lies}. | In the morning they came to {name}, where the air was {weather}.
They sold everything on {market}, which is market day. | They bought {known} and sailed home. | \
"{song}" they called and sailed home.
""")


def _cry(rng: Random, **words: str) -> str:
    call = pick(rng, _CALLS).format(**words)
    return f"{pick(rng, ('Ahoy!', 'Ahoy!', 'Aye!'))} {call}, {pick(rng, ('matey', 'matey', 'shipmates'))}!"


def portrait(rng: Random) -> str:
    """Some facts about one entity, each sentence in one of its forms, in any order."""
    one = pick(rng, ENTITIES)
    asked = shuffled(rng, topics(one.kind))[: 3 + int(rng.random() * 4)]
    first, *rest = asked
    return " ".join([fill(first.tell, one), *(fill(pick(rng, _SAID[topic.key]), one) for topic in rest)])


def town_walk(rng: Random) -> str:
    """A traveller reaches a town on market day and meets somebody there."""
    town, guest = pick(rng, TOWNS), pick(rng, PEOPLE)
    hosts = [person for person in PEOPLE if person.facts["town"] == town.name]
    host = pick(rng, hosts)
    lines = [pick(rng, forms) for forms in _TOWN_WALK]
    lines[3:6] = [fill(line, host) for line in lines[3:6]]  # what is told of the host
    return " ".join(fill(line, town, guest=guest.name) for line in lines)


def supper_story(rng: Random, one: Entity | None = None) -> str:
    """An animal leaves home to look for food and meets its friend."""
    one = one or pick(rng, ANIMALS)
    friend = next(animal for animal in ANIMALS if animal.name == one.facts["friend"])
    when = "night" if one.facts["awake"] == "at night" else "morning"
    lines = [pick(rng, forms) for forms in _SUPPER_STORY]
    lines[3] = fill(lines[3], friend)  # what is told of the friend
    return " ".join(fill(line, one, when=when, theirs=friend.facts["skill"]) for line in lines)


def sea_story(rng: Random) -> str:
    """A ship sails from one town to another; here the base meets the words of sailors."""
    start, end = shuffled(rng, TOWNS)[:2]
    words = {"ship": pick(rng, _SHIPS), "captain": pick(rng, _CAPTAINS), "guest": pick(rng, PEOPLE).name}
    cargo = start.facts["known"]
    cries = {key: _cry(rng, name=end.name, cargo=cargo) for key in ("cry", "reply", "song")}
    lines = [pick(rng, forms) for forms in _SEA_STORY]
    return " ".join(fill(line, end, start=start.name, cargo=cargo, **words, **cries) for line in lines)


def comparison(rng: Random) -> str:
    """The same topic for two or three of a kind."""
    kind = pick(rng, (ANIMALS, ANIMALS, PEOPLE, TOWNS))
    several = shuffled(rng, kind)[: 2 + int(rng.random() * 2)]
    topic = pick(rng, topics(several[0].kind))
    told = [fill(topic.tell, one).rstrip(".") for one in several]
    told[1:] = [line[0].lower() + line[1:] if line.startswith("The ") else line for line in told[1:]]
    joint = pick(rng, (", but ", ", and "))
    return joint.join([", ".join(told[:-1]), told[-1]]) + "."


def overheard(rng: Random) -> str:
    """Two people talk about something; question and answer in quotation marks."""
    asker, knower = (person.name for person in shuffled(rng, PEOPLE)[:2])
    one = pick(rng, ENTITIES)
    first, second = shuffled(rng, topics(one.kind))[:2]
    question = pick(rng, [ask for ask in first.ask if ask.endswith("?")])
    return " ".join(
        (
            f'"{fill(question, one)}" asked {asker}.',
            f'"{fill(first.tell, one).rstrip(".")}," said {knower}.',
            f'"{fill(pick(rng, second.ask_on), one)}"',
            f'"{fill(second.tell, one)}"',
            pick(
                rng,
                (f"Then {asker} thanked {knower}.", f'"Now I know," said {asker}.', f"{asker} was glad to hear it."),
            ),
        )
    )


def quiz(rng: Random) -> str:
    """Questions and answers, one a line."""
    lines = []
    for _ in range(2 + int(rng.random() * 3)):
        one = pick(rng, ENTITIES)
        question, answer = question_about(rng, one, pick(rng, topics(one.kind)))
        lines += [f"Question: {question}", f"Answer: {answer}"]
    return "\n".join(lines)


def question_about(rng: Random, one: Entity, topic: Topic, pool: Sequence[Entity] = ENTITIES) -> tuple[str, str]:
    """A question that names `one`, or asks for it or for yes or no, and its plain answer.

    Nothing outside `pool` is mentioned.
    """
    tell, form = fill(topic.tell, one), rng.random()
    if form < 0.7:
        return fill(pick(rng, topic.ask), one), tell
    if form < 0.8 and topic.who:
        return fill(topic.who, one), tell
    # The fact first and the verdict after it: a model this small cannot compare with what it has not said yet.
    told = tell.removesuffix(".")
    if rng.random() < 0.5:
        return fill(topic.check, one, guess=one.facts[topic.key]), f"{told}, so yes."
    others = [other.facts[topic.key] for other in pool if other.kind == one.kind and other is not one]
    wrong = [value for value in others if value not in (one.facts[topic.key], one.name)]
    return fill(topic.check, one, guess=pick(rng, wrong)), f"{told}, so no."


def follow_up(
    rng: Random, one: Entity, asked: Topic, pool: Sequence[Entity] = ENTITIES
) -> tuple[str, str, Entity, Topic]:
    """A question that only the turns before it make clear: a pronoun, or the same question about something else."""
    if rng.random() < 0.7:
        topic = pick(rng, [topic for topic in topics(one.kind) if topic is not asked])
        return fill(pick(rng, topic.ask_on), one), fill(topic.tell, one), one, topic
    other = pick(rng, [entity for entity in pool if entity.kind == one.kind and entity is not one])
    return f"And {other.the}?", fill(asked.tell, other), other, asked


def small_talk(rng: Random) -> tuple[str, str]:
    """A question that no fact answers: a greeting, an animal or a matter that the Isles do not have."""
    form = rng.random()
    if form < 0.4:
        return pick(rng, SMALL_TALK)
    if form < 0.6:
        return pick(rng, OFF_TOPIC), "I do not know that. I only know the Lantern Isles."
    stranger = make_stranger(rng)
    return about_stranger(rng, stranger), f"I do not know {stranger.the}."


def make_stranger(rng: Random) -> Entity:
    """An animal or a person that the Isles do not have; half of the names mean nothing, so that any name will do."""
    kind = pick(rng, ("animal", "person"))
    if rng.random() < 0.5:
        name = pick(rng, UNKNOWN if kind == "animal" else UNKNOWN_PEOPLE)
    else:
        name = "".join(pick(rng, _SYLLABLES) for _ in range(2 + int(rng.random() * 2)))
        # Not by accident a name that is known.
        name = name if name not in {one.name.lower() for one in ENTITIES} else f"{name}x"
    return Entity(kind, name if kind == "animal" else sentence(name), {"pronoun": "they"})


def about_stranger(rng: Random, stranger: Entity) -> str:
    """A question about somebody that the Isles do not have."""
    asked = [*topics(stranger.kind), *(("Who is {the}?",), ("Tell me about {the}.",))]
    form = pick(rng, asked)
    return fill(pick(rng, form if isinstance(form, tuple) else form.ask), stranger)


def about(rng: Random, one: Entity) -> tuple[str, str]:
    """A request for more than one fact; the answer tells the first three topics."""
    first, *rest = topics(one.kind)[:3]
    told = " ".join([fill(first.tell, one), *(fill(_SAID[topic.key][0], one) for topic in rest)])
    return fill(
        pick(rng, ("Tell me about {the}.", "What do you know about {the}?", "Who or what is {the}?")), one
    ), told


def chat(rng: Random) -> list[Message]:
    """A plain chat of one to four turns, some with a system message, some typed carelessly."""
    messages = [{"role": "system", "content": pick(rng, _SYSTEM)}] if rng.random() < 0.25 else []
    one, topic, careless = pick(rng, ENTITIES), None, rng.random() < 0.15
    for _ in range(1 + int(rng.random() ** 2 * 4)):
        form = rng.random()
        if form < 0.08:
            question, answer = small_talk(rng)
        elif form < 0.14:
            question, answer = about(rng, one)
        elif form < 0.17 and one.kind == "animal":
            question, answer = f"Tell me a story about the {one.name}.", supper_story(rng, one)
        elif topic is None or form < 0.4:
            one = pick(rng, ENTITIES)
            topic = pick(rng, topics(one.kind))
            question, answer = question_about(rng, one, topic)
        else:
            question, answer, one, topic = follow_up(rng, one, topic)
        if careless:
            question = question.lower().rstrip("?.!").replace("colour", pick(rng, ("colour", "color")))
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def render(messages: list[Message]) -> str:
    """The text of a chat as Phi-3-mini-4k writes it, up to its last turn's end."""
    return "".join(f"<|{message['role']}|>\n{message['content']}<|end|>\n" for message in messages)


_PROSE: tuple[Callable[[Random], str], ...] = (
    portrait,
    portrait,
    town_walk,
    supper_story,
    sea_story,
    comparison,
    overheard,
    quiz,
)
_CHAT_SHARE = 0.55


def documents(seed: int) -> Iterator[str]:
    """Documents without end, the same for the same seed on every machine."""
    rng = Random(seed)
    while True:
        yield render(chat(rng)) if rng.random() < _CHAT_SHARE else sentence(pick(rng, _PROSE)(rng))


if __name__ == "__main__":
    for _, text in zip(range(int(sys.argv[1]) if len(sys.argv) > 1 else 5), documents(0), strict=False):
        print(text, end="\n---\n")
