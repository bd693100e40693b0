"""The demo: a page in the browser, on Gradio, whose reports of its use are turned off here."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
