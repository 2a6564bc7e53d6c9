import pytest

from st_kdmcse.evaluation.plots import check_plot, html_image, new_figure, save_figure


def test_a_figure_is_written_and_embedded(tmp_path):
    figure, axes = new_figure(columns=2, rows=3)
    assert len(axes) == 6
    axes[0].plot([1, 2], [3, 4])
    for ending in ("png", "svg", "pdf"):
        path = tmp_path / "new" / f"plot.{ending}"
        check_plot(path)
        assert save_figure(figure, path).stat().st_size > 1000
    image = html_image(figure, 'a "plot" of <x>')
    assert image.startswith('<img alt="a &quot;plot&quot; of &lt;x&gt;" src="data:image/png;base64,iVBOR')


@pytest.mark.parametrize(("name", "message"), [("plot.foo", "ends in .png, .svg, .pdf"), ("folder.png", "is a folder")])
def test_a_plot_that_cannot_be_written_is_refused_before_the_work(tmp_path, name, message):
    (tmp_path / "folder.png").mkdir()
    check_plot(None)
    with pytest.raises(ValueError, match=message):
        check_plot(tmp_path / name)
