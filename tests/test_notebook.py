"""demo/lpd.ipynb: its cells run as they stand, one after the other, in a Python of its own.

What a notebook program adds, a kernel and the display of pictures, is not tested."""

import json

import programs

NOTEBOOK = programs.REPO / "demo" / "lpd.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_notebook_runs_top_to_bottom_and_draws_what_it_shows(tmp_path):
    """Each plt.show() leaves a picture; what editing keeps is kept."""
    script = tmp_path / "notebook.py"
    first = "import matplotlib\n\nmatplotlib.use('Agg')\n"
    last = "print('pictures:', len(plt.get_fignums()))\n"
    script.write_text("\n\n".join([first, *CODE, last]))
    outcome = programs.finished(programs.python(script, cwd=NOTEBOOK.parent))
    assert "kept tokens unchanged: True" in outcome.out
    assert "pictures: 12\n" in outcome.out


def test_notebook_holds_no_outputs():
    assert [cell for cell in CELLS if cell.get("outputs")] == []
