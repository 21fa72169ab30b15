"""English sentences and their Spanish translations, from OPUS-100 (Zhang et al. 2020, arXiv 2004.11867), whose texts
come from many public collections; a licence for the whole is not stated.

A raw row:
    {"translation": {"en": "Try on that shirt.", "es": "Pruébate esa camisa."}}
"""

from pipeline.tasks import Example, HubSource, NoOptions, Row, Task


def to_example(row: Row, index: int, options: NoOptions) -> Example:
    """The English sentence, then what to do with it; the Spanish one."""
    pair = row["translation"]
    return Example(
        id=f"eng_spa-{index:06d}",
        task="eng_spa",
        prompt=f"{pair['en']}\n\nTranslate this sentence into Spanish.\n\nSpanish:",
        answer=pair["es"],
    )


TASK = Task(
    name="eng_spa",
    version=1,
    summary="English sentences translated into Spanish",
    source=HubSource("Helsinki-NLP/opus-100", "en-es", {"train": "train", "validation": "validation", "test": "test"}),
    to_example=to_example,
    metrics=("bleu", "chrf"),
)
