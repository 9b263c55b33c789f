"""The operator's chat template, which is compiled at start so that its mistakes are not blamed on requests."""

from __future__ import annotations

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from loongjax.errors import ConfigError


def check_chat_template(source: str, template: str) -> None:
    """Compiles a template as the tokenizer will, with `break` and `continue`, and blocks of `generation`.

    Args:
        source: what a message calls the template.
        template: its text.

    Raises:
        ConfigError: a mistake in its syntax, or a filter that does not exist.
    """
    environment = jinja2.Environment(extensions=[loopcontrols, _GenerationBlocks])
    try:
        environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{source} is no Jinja template (line {error.lineno}: {error.message}): mend it") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is nested too deeply: mend it") from error


class _GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}`, with which templates mark what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What is in the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
