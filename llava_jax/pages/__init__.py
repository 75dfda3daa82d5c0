"""HTML reports of the other rooms: one base template, tables, curves and thumbnails."""
