"""What people look at: the loss curve of a run, and pages of plots and tables made of files alone.

runs.py and run_page.py turn run folders into a document; files.py writes any document as Markdown
with PNG files and as one HTML page; charts.py draws. The reports of `benchmarks/` share all of it.
"""

from scalellm.report.loss import draw_loss, smooth
from scalellm.report.run_page import report_runs

__all__ = ["draw_loss", "report_runs", "smooth"]
