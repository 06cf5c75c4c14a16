"""The app: pages over a workspace, drawn by Streamlit. Installed as ``dictlearn_app``."""
