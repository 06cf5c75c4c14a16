"""What pages are drawn with. Each file turns plain data into one payload and mounts the component that draws it."""
