"""Which pages of the cache each request has, and which prompts begin with pages that are there."""

from collections import OrderedDict

SCRAP = 0  # a page that belongs to nobody: what pads a batch writes here


class Pages:
    """Pages in use, free ones, and ones that nobody uses but whose tokens are known.

    A full page is known by the page before it and its own tokens, compared exactly: two
    prompts share pages only where all tokens up to the end of them are the same.
    """

    def __init__(self, count, page_size, reuse=True):
        self.page_size, self.reuse, self.total = page_size, reuse, count - 1
        self.free = [*range(count - 1, SCRAP, -1)]
        self.users = [0] * count
        self.known = {}  # (the page before, tokens) -> page
        self.key_of = {}  # page -> its key in `known`
        self.idle = OrderedDict()  # known pages without users, longest idle first

    @property
    def available(self):
        return len(self.free) + len(self.idle)

    def take(self, count):
        """That many pages, of which there have to be so many."""
        taken = [self.free.pop() for _ in range(min(count, len(self.free)))]
        while len(taken) < count:  # None follows these: what follows has never been idle longer.
            page, _ = self.idle.popitem(last=False)
            del self.known[self.key_of.pop(page)]
            taken.append(page)
        for page in taken:
            self.users[page] = 1
        return taken

    def find(self, tokens):
        """The pages with a prompt's beginning, one user more of each; a token at least is left."""
        found, size = [], self.page_size
        for start in range(0, (len(tokens) - 1) // size * size if self.reuse else 0, size):
            key = (found[-1] if found else None, tuple(tokens[start : start + size]))
            if key not in self.known:
                break
            found.append(self.known[key])
        for page in found:
            self.users[page] += 1
            self.idle.pop(page, None)
        return found

    def remember(self, pages, first, tokens):
        """The pages from the first on that tokens have filled, for prompts to come.

        Where another request has filled one with the same tokens, `pages` gets that one
        instead: a known page always follows one that its own users hold.
        """
        size = self.page_size
        for start in range(0, len(tokens) // size * size if self.reuse else 0, size):
            i = first + start // size
            key = (pages[i - 1] if i else None, tuple(tokens[start : start + size]))
            same = self.known.setdefault(key, pages[i])
            if same == pages[i]:
                self.key_of[same] = key
                continue
            self.users[same] += 1
            self.idle.pop(same, None)
            self.give_back(pages[i : i + 1])
            pages[i] = same

    def give_back(self, pages):
        """One user less, of the last page first: it is to be idle for longer than those before."""
        for page in reversed(pages):
            self.users[page] -= 1
            if self.users[page]:
                continue
            if page in self.key_of:
                self.idle[page] = None
            else:
                self.free.append(page)
