"""The demo: a page in the browser, on Gradio, which is told here not to report its use."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
