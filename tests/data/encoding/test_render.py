"""Rows to examples: the right row through the right template, read in one go, and what cannot be rendered."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.prompt_format import Exemplar
from apprentice.data.encoding.render import Rendered, Renderer
from apprentice.data.sampling.plan import Draw
from apprentice.data.sources.locate import Reader
from apprentice.errors import DataError, RowError
from apprentice.tasks.schema import Example
from tests.data.small import CorpusOf


def draw(row: int, task: str = "sums", template: str = "add", shots: tuple[int, ...] = ()) -> Draw:
    return Draw(0, task, "zero_shot", template, row, shots, 0)


@pytest.fixture
def renderer(corpus: Corpus) -> Renderer:
    return Renderer(corpus.tasks, corpus.indices)


def test_one_row(renderer: Renderer) -> None:
    assert renderer.example("sums", "train", 4, "add") == Example(
        "sums", "add", "Add the two numbers.", "4 and 12", "16", (), ("16",)
    )
    assert renderer.example("stories", "train", 3, "ending").choices == ("badly", "well")


def test_exemplars_share_the_template(renderer: Renderer) -> None:
    example, exemplars = renderer.render_draw(draw(4, shots=(2, 7)))
    assert example.target == "16"
    assert exemplars == [Exemplar("Add the two numbers.", "2 and 6", "8"), Exemplar("Add the two numbers.", "7 and 4", "11")]
    inverted = renderer.render_draw(draw(4, template="back"))
    assert inverted == Rendered(
        Example("sums", "back", "Two numbers with the sum 16, please.", "", "4 and 12", (), ("4 and 12",)), []
    )


def test_many_draws_are_as_one_by_one(corpus: Corpus, renderer: Renderer) -> None:
    draws = corpus.plan.draws(0, 64)
    assert any(draw.shots for draw in draws)
    assert renderer.render_draws(draws) == [Renderer(corpus.tasks, corpus.indices).render_draw(draw) for draw in draws]


def test_a_source_is_read_once_for_all_draws(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[list[int]] = []
    rows = Reader.rows

    def noted(self: Reader, ids: list[int]) -> list[dict[str, object]]:
        reads.append([int(number) for number in ids])
        return rows(self, ids)

    monkeypatch.setattr(Reader, "rows", noted)
    examples = renderer.render_draws(
        [draw(9, shots=(1,)), draw(3, "stories", "mood"), draw(1, shots=(9, 5)), draw(3, "stories", "ending")]
    )
    assert len(examples) == 4
    assert reads == [[1, 5, 9], [3]]


def test_what_cannot_be_rendered(corpus_of: CorpusOf) -> None:
    corpus = corpus_of(validation=0.0)
    source = corpus.indices["sums"].train_source
    assert source is not None
    table = pq.read_table(source.files[0])
    broken = table.column("a").to_pylist()
    broken[5] = None
    pq.write_table(table.set_column(table.column_names.index("a"), "a", pa.array(broken, pa.int64())), source.files[0])
    renderer = Renderer(corpus.tasks, corpus.indices)
    with pytest.raises(RowError, match="field 'a' is null") as caught:
        renderer.render_draw(draw(5))
    assert caught.value.reason == "null"
    first, second = renderer.render_draws([draw(5), draw(6, shots=(5, 7))])
    assert isinstance(first, RowError)
    assert isinstance(second, Rendered)
    assert [shot.answer for shot in second.exemplars] == ["11"]  # the broken one is left out


def test_a_split_that_there_is_not(renderer: Renderer) -> None:
    with pytest.raises(DataError, match="task 'sums' has no test split; declare one"):
        renderer.example("sums", "test", 0, "add")
