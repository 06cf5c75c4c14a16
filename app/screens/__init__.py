"""One file a page: read the link, fetch the data, draw it.

The folder is not called pages/: Streamlit takes a folder of that name beside main.py for its older kind of multi-page
app and, when the first address that a server is asked for is a deep link, runs that file instead of main.py.
"""
