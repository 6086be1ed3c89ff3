"""Results as one page that needs nothing beside it, and its pictures as PNG files."""

import base64
import io
from pathlib import Path

from bench import pictures, sweep
from bench.groups import changes, grouped, is_ours, of_limit

TEMPLATE = Path(__file__).with_name("report.html.j2")
GROWTH = "A training step. A cross: not run, as it would exceed its bound."
#: By the name of the file: title, and what is shown.
PICTURES = {
    "gains": ("Against the fastest", "Red bars are losses. In brackets, the fastest other contestant."),
    "limits": (
        "Against the machine",
        "100 % is the machine's own limit: its measured peaks of products and of copying.",
    ),
    "sweep_cpu": ("Growth with every size, on the CPU", GROWTH),
    "sweep_cuda": ("Growth with every size, on the GPU", GROWTH),
}


def number(value, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def milliseconds(value: float) -> str:
    """Write milliseconds with three significant digits."""
    digits = next((digits for digits, end in ((3, 1), (2, 10), (1, 100)) if value < end), 0)
    return f"{value:,.{digits}f}"


def percent_of_limit(row: dict) -> str:
    reached = of_limit(row)
    return "" if reached is None else f"{100 * reached:.1f} %" if reached < 0.1 else f"{100 * reached:.0f} %"


def flat(facts: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Facts within facts in one list."""
    found = []
    for name, value in facts.items():
        name = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            found += flat(value, f"{name}: ")
        else:
            found.append((name, f"{value:,.1f}" if isinstance(value, float) else str(value)))
    return found


def figures(result: dict) -> dict:
    """Draw the pictures that there is something to show in, by the name of their file."""
    groups = grouped(result["timings"])
    made = {
        "gains": pictures.gains(groups),
        "limits": pictures.limits(groups),
    }
    for device in dict.fromkeys(row["device"] for row in result["sweep"]):
        made[f"sweep_{device}"] = pictures.sweep([row for row in result["sweep"] if row["device"] == device])
    return {name: figure for name, figure in made.items() if figure is not None}


def png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def page(result: dict, images: dict[str, bytes], old: dict | None = None, compared: str | None = None) -> str:
    """The HTML page. `old` is what it is compared with, `compared` its name."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"ms": milliseconds, "number": number, "limit": percent_of_limit, "ours": is_ours}
    return environment.from_string(TEMPLATE.read_text()).render(
        machine=result["machine"],
        facts=flat(result["machine"]),
        verification=result["verification"],
        groups=grouped(result["timings"]),
        fits=sweep.fits(result["sweep"]),
        pictures=[
            {"title": title, "text": text, "data": base64.b64encode(images[name]).decode()}
            for name, (title, text) in PICTURES.items()
            if name in images
        ],
        compared=compared,
        changes=[] if old is None else changes(result["timings"], old["timings"]),
    )


def write(result: dict, folder: Path, old: dict | None = None, compared: str | None = None) -> list[Path]:
    """report.html and the PNG files, in a folder that is made where it is missing; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {name: png(figure) for name, figure in figures(result).items()}
    paths = [folder / "report.html"]
    paths[0].write_text(page(result, images, old, compared), encoding="utf-8")
    for name, content in images.items():
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(content)
    return paths
