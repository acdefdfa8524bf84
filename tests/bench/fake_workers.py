"""Workers that answer at once, in place of the processes of a benchmark."""

from rlinvariant.bench import measure
from rlinvariant.models import shapes


class Fakes:
    """Puts fakes in place of processes: `answer` gives what each would answer; `dead` ones end when they are first asked."""

    def __init__(self, monkeypatch, module, answer, dead=()):
        self.asked, self.closed = [], []
        fakes = self

        class Worker:
            def __init__(self, name, side, *arguments):
                assert name == module.__name__
                self.side = side

            def ask(self, **request):
                self.send(**request)
                return self.answer()

            def send(self, **request):
                fakes.asked.append((self.side, request))
                self.request = request

            def answer(self):
                if self.side in dead:
                    raise measure.WorkerEnded(f"{self.side} ended with exit code 9\nValueError: no memory")
                return answer(self.side, **self.request)

            def ready(self, seconds):
                return True

            def no_more(self):
                pass

            def close(self):
                fakes.closed.append(self.side)

        monkeypatch.setattr(module, "Worker", Worker)
        monkeypatch.setattr(shapes, "build", lambda *_, **__: "path")
