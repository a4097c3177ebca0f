"""`foveate playground`: a page in the browser to try methods; `table` asks, `drawing` draws, `page` is what is seen."""
