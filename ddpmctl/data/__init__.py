"""Loading and checking of the lab's folders, and the cache of decoded images."""
