"""Support tickets as training data: a data format, a recipe that uses it, a callback, and an export target."""

from importlib.resources import files

from phi3_lora_plugin import hookimpl

TICKETS = files(__name__) / "tickets.csv"  # thirty tickets to try it with


def ticket(row):
    """Turn one row of the help desk's export into a conversation of one question and one answer."""
    missing = [key for key in ("subject", "question", "reply") if not row.get(key)]
    if missing:
        raise ValueError(f"a ticket needs a subject, a question and a reply; {' and '.join(missing)} missing")
    return [
        {"role": "user", "content": f"{row['subject']}: {row['question']}"},
        {"role": "assistant", "content": row["reply"]},
    ]


@hookimpl
def register_dataset_adapters(register):
    register("tickets", ticket)


@hookimpl
def register_recipes(register):
    register("support-tickets", files(__name__) / "support-tickets.yaml")


@hookimpl
def register_exporters(register):
    def export(adapted, wanted, folder):  # imports transformers only when it is asked for
        from my_plugin import help_desk

        return help_desk.export(adapted, wanted, folder)

    register("help-desk", export)


@hookimpl
def trainer_callbacks(recipe):
    if recipe.data.format != "tickets":
        return None  # every plugin is called for every run: add nothing to the runs of others
    from my_plugin.loss_log import LossLog  # imports transformers, which takes seconds; discovery must not

    return [LossLog()]
