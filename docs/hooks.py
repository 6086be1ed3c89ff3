"""What mkdocs does beside its own: the pictures of bench/results and CONTRIBUTING.md are part of the site."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def on_files(files, config):
    """Add each picture as results/<name>."""
    for path in sorted((ROOT / "bench" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Name pictures and pages by their place in the site, where the repository has another."""
    if page.file.src_path == "contributing.md":
        markdown = (ROOT / "CONTRIBUTING.md").read_text()
    return markdown.replace("../../bench/results/", "results/").replace("](docs/pages/", "](")
