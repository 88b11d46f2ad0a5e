"""Fixed texts: templates with a place for the class name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from upt_fast.methods.options import MethodConfig

DEFAULT_TEMPLATE = "a photo of a {}."
# the seven that CLIP's authors chose for ImageNet
IMAGENET_SELECT = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
TEMPLATES: dict[str, tuple[str, ...]] = {"default": (DEFAULT_TEMPLATE,), "imagenet_select": IMAGENET_SELECT}


def expand_templates(templates: str | tuple[str, ...]) -> tuple[str, ...]:
    """Templates with names ("imagenet_select") replaced by what they stand for.

    Args:
        templates: texts with one {} for the class name, or keys of TEMPLATES; one or several.
    Raises:
        ValueError: no template, or one that is neither a name nor a text with one {}.
    """
    entries = (templates,) if isinstance(templates, str) else templates
    if not isinstance(entries, (tuple, list)) or not entries:
        raise ValueError(f"templates={templates!r}; wanted a template such as {DEFAULT_TEMPLATE!r}, or several")
    expanded: list[str] = []
    for entry in entries:
        if not isinstance(entry, str) or (entry not in TEMPLATES and entry.count("{}") != 1):
            raise ValueError(
                f"template {entry!r}; wanted a text with one {{}} for the class name, for example "
                f"{DEFAULT_TEMPLATE!r}, or one of {', '.join(map(repr, TEMPLATES))}"
            )
        expanded += TEMPLATES.get(entry, (entry,))
    return tuple(expanded)


@dataclass(frozen=True)
class TemplatesConfig(MethodConfig):
    """The options of methods that have fixed texts.

    Args:
        templates: a text with one {} for the class name; several, whose class features are averaged; or a name for
            some: "default", "imagenet_select" (seven). Texts and names may stand together.
    """

    templates: str | tuple[str, ...] = field(default=DEFAULT_TEMPLATE, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.templates, list):  # as JSON has it
            object.__setattr__(self, "templates", tuple(self.templates))
        expand_templates(self.templates)

    @property
    def template_texts(self) -> tuple[str, ...]:
        """The templates with names replaced by what they stand for."""
        return expand_templates(self.templates)


def one_template(config: TemplatesConfig) -> str:
    """Why released code, which has one template, computes something else; empty: it does not."""
    count = len(config.template_texts)
    return "" if count == 1 else f"its text features are the mean of {count} templates, the released code has one"
