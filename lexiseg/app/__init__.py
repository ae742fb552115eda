"""The HTTP service and the web page (extra ``app``)."""
