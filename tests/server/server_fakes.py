"""An engine and a tokenizer whose every answer can be worked out by hand.

The tokenizer has the 256 bytes, then `<s>`, `</s>`, `<unk>`, then a few words; the vocabulary is padded beyond that.
The engine answers with the bytes of a script, one token a step, and counts what it runs.
"""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2

from loongjax.core.request import NO_SLO, FinishReason, Phase, ServiceLevel, Timings, TokenLogprobs
from loongjax.core.sampling import SamplingParams
from loongjax.engine.client import EngineStats, ModelInfo, OutputDelta
from loongjax.errors import ContextLengthError, EngineDeadError, QueueFullError, RequestError

BOS, EOS, UNK = 256, 257, 258
WORDS = ("hello", " world", "<|user|>", "the")
SPECIALS = {BOS: "<s>", EOS: "</s>", UNK: "<unk>"}
VOCAB_SIZE = 272
MAX_MODEL_LEN = 4096
SCRIPT = "The quick brown fox jumps over the lazy dog. "
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'tool' and not m.content %}{{ raise_exception('empty') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% if not (loop.last and continue_final_message) %}\n{% endif %}"
    "{% endfor %}"
    "{% if tools %}[tools]{{ tools | length }}{% endif %}{% if style %}[{{ style }}]{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class ByteTokenizer:
    """Bytes, special tokens, and a few words that are matched first."""

    def __init__(self, *, has_chat_template: bool = True) -> None:
        self._has_chat_template = has_chat_template
        pieces = [*SPECIALS.values(), *WORDS]
        self._ids = {piece: BOS + i for i, piece in enumerate(pieces)}
        self._pattern = re.compile("|".join(re.escape(piece) for piece in pieces))

    @property
    def vocab_size(self) -> int:
        return BOS + len(self._ids)

    @property
    def has_chat_template(self) -> bool:
        return self._has_chat_template

    @property
    def takes_tools(self) -> bool:
        return True

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        token_ids = [BOS] if add_special_tokens else []
        end = 0
        for match in self._pattern.finditer(text):
            token_ids += text[end : match.start()].encode()
            token_ids.append(self._ids[match[0]])
            end = match.end()
        return [*token_ids, *text[end:].encode()]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        parts: list[bytes] = []
        for token_id in token_ids:
            if token_id < 256:
                parts.append(bytes([token_id]))
            elif not (skip_special_tokens and token_id in SPECIALS):
                parts.append((self._spelling(token_id) or "").encode())
        return b"".join(parts).decode("utf-8", errors="replace")

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        template = kwargs.pop("chat_template", None) or TEMPLATE
        environment = jinja2.Environment()
        environment.globals["raise_exception"] = _raise_template_error
        text = environment.from_string(template).render(messages=messages, **kwargs)
        return self.encode(text, add_special_tokens=False)

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        return [f"<0x{token_id:02X}>" if token_id < 256 else self._spelling(token_id) for token_id in token_ids]

    def _spelling(self, token_id: int) -> str | None:
        return next((piece for piece, known in self._ids.items() if known == token_id), None)


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)


@dataclasses.dataclass
class Call:
    """One call of `generate`."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    request_id: str
    priority: int
    slo: ServiceLevel


class FakeEngine:
    """Answers every prompt with the bytes of `script`, again and again, until the limit or a stop.

    Sample i of a request begins i characters into the script. Each token's log-probability is -id / 100, and the most
    probable ones are ids 97 (a), 98 (b), ... with -1, -2, ...
    """

    def __init__(self, script: str = SCRIPT, *, delay_s: float = 0.0, eos_after: int | None = None) -> None:
        self.script = script
        self.delay_s = delay_s
        self.eos_after = eos_after
        """Tokens before the model ends by itself, unless `ignore_eos`."""
        self.default_sampling: dict[str, float | int] = {}
        self.calls: list[Call] = []
        self.num_live = 0
        self.most_live = 0
        self.num_aborted = 0
        self.num_tries = 0
        self.refuse_with: Exception | None = None
        self.num_refusals = 2**31
        """How many tries `refuse_with` refuses."""
        self.max_live_samples = 2**31
        """Samples that there is a place for: a request that brings more meets a full queue."""
        self.num_live_samples = 0
        self.fail_after: tuple[int, Callable[[], Exception]] | None = None
        self.finish_after: tuple[int, FinishReason] | None = None
        self.first_token = asyncio.Event()
        self.first_token.set()
        self.is_dead = False
        self.is_wedged = False
        self.is_draining = False
        self.num_closed = 0
        self.engine_stats = EngineStats()

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            checkpoint="/models/tiny-llama",
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(EOS,),
            default_sampling=self.default_sampling,
        )

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        slo: ServiceLevel = NO_SLO,
    ) -> AsyncIterator[OutputDelta]:
        self._admit(prompt_token_ids, sampling)
        assert request_id not in {call.request_id for call in self.calls}
        self.calls.append(Call(list(prompt_token_ids), sampling, request_id, priority, slo))
        self.num_live += 1
        self.num_live_samples += sampling.n
        self.most_live = max(self.most_live, self.num_live)
        num_finished = 0
        try:
            await self.first_token.wait()
            samples = [self._sample(index, list(prompt_token_ids), sampling) for index in range(sampling.n)]
            step = 0
            while num_finished < sampling.n:
                await asyncio.sleep(self.delay_s)
                if self.fail_after is not None and step >= self.fail_after[0]:
                    raise self.fail_after[1]()
                for delta in [delta for sample in samples if (delta := next(sample, None)) is not None]:
                    num_finished += delta.finish_reason is not None
                    yield delta
                step += 1
        finally:
            self.num_live -= 1
            self.num_live_samples -= sampling.n
            self.num_aborted += num_finished < sampling.n

    def _admit(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        if self.is_dead or self.is_draining:
            raise EngineDeadError("the engine is dead")
        self.num_tries += 1
        if self.refuse_with is not None and self.num_tries <= self.num_refusals:
            raise self.refuse_with
        if self.num_live_samples + sampling.n > self.max_live_samples:
            raise QueueFullError(f"{self.num_live_samples} requests wait already")
        if not prompt_token_ids:
            raise RequestError("the prompt is empty", "prompt")
        if len(prompt_token_ids) + (sampling.max_tokens or 1) > MAX_MODEL_LEN:
            raise ContextLengthError(
                f"{len(prompt_token_ids)} prompt tokens and {sampling.max_tokens} more exceed {MAX_MODEL_LEN}"
            )

    def _sample(self, index: int, prompt: list[int], sampling: SamplingParams) -> Iterator[OutputDelta]:
        script = self.script[index:] + self.script
        limit = MAX_MODEL_LEN - len(prompt) if sampling.max_tokens is None else sampling.max_tokens
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None:
            prompt_logprobs = tuple(logprob_of(token_id, sampling.prompt_logprobs) for token_id in prompt[1:])
        nothing = OutputDelta(index=index, num_prompt_tokens=len(prompt))
        if limit == 0:
            yield dataclasses.replace(nothing, prompt_logprobs=prompt_logprobs, finish_reason=FinishReason.LENGTH)
            return
        decoder = codecs.getincrementaldecoder("utf-8")()
        data = script.encode()
        history = (Phase("prefill", (0, 1), (0,), len(prompt)),)
        for step in range(limit):
            is_eos = self.eos_after is not None and step >= self.eos_after and not sampling.ignore_eos
            token_id = EOS if is_eos else data[step % len(data)]
            text = "" if is_eos else decoder.decode(bytes([token_id]))
            reason, stop_reason = self._outcome(step, limit, token_id, text, sampling)
            if stop_reason is not None and not sampling.include_stop_str_in_output:
                text = ""
            yield dataclasses.replace(
                nothing,
                text=text,
                token_ids=(token_id,),
                logprobs=() if sampling.logprobs is None else (logprob_of(token_id, sampling.logprobs),),
                prompt_logprobs=prompt_logprobs if step == 0 else None,
                finish_reason=reason,
                stop_reason=stop_reason,
                num_output_tokens=step + 1,
                num_cached_tokens=0,
                history=history if reason else (),
                timings=Timings(queue_s=1.0, prefill_s=2.0, decode_s=4.0) if reason else None,
                error="device lost" if reason is FinishReason.ERROR else None,
            )
            if reason is not None:
                return

    def _outcome(
        self, step: int, limit: int, token_id: int, text: str, sampling: SamplingParams
    ) -> tuple[FinishReason | None, int | str | None]:
        """Only one-character stop strings are understood."""
        if self.finish_after is not None and step >= self.finish_after[0]:
            return self.finish_after[1], None
        if token_id == EOS:
            return FinishReason.STOP, None
        if token_id in sampling.stop_token_ids:
            return FinishReason.STOP, token_id
        if text and text in sampling.stop:
            return FinishReason.STOP, text
        return (FinishReason.LENGTH, None) if step + 1 == limit else (None, None)

    async def stats(self) -> EngineStats:
        if self.is_dead:
            raise EngineDeadError("the engine is dead")
        if self.is_wedged:
            await asyncio.Event().wait()
        return self.engine_stats

    async def check_health(self, timeout_s: float = 10.0) -> None:
        if self.is_dead:
            raise EngineDeadError("the engine is dead")
        if self.is_wedged:
            await asyncio.Event().wait()

    async def drain(self, timeout_s: float) -> None:
        """As time is over: aborts what is left."""
        self.is_draining = True
        self.finish_after = (0, FinishReason.ABORT)

    async def close(self) -> None:
        self.num_closed += 1


def logprob_of(token_id: int, num_top: int) -> TokenLogprobs:
    top = tuple((97 + i, -1.0 - i) for i in range(num_top))
    return TokenLogprobs(token_id, -token_id / 100, token_id + 1, top)
