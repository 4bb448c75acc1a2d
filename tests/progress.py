"""A reporter for tests."""


class Seen:
    """A reporter that remembers how far its work has come."""

    def start(self, label, *, total):
        self.total, self.done = total, []
        return self

    def update(self, done, *, note=""):
        self.done.append(done)
