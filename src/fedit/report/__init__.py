"""From a run folder, finished or not, to one page: ``report.html``, which needs nothing but a browser."""

from fedit.report.folder import RunFolder
from fedit.report.render import write_report

__all__ = ["RunFolder", "write_report"]
