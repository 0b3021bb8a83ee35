# ruff: noqa: RUF001
"""Words that prose of a language cannot do without, for many languages at once.

Gopher's eight for English, the same kind for the rest: a text that has none of them is a list, a
table or noise. Scripts without spaces between words have no line here.
"""

from __future__ import annotations

_BY_LANGUAGE = (
    "the be to of and that have with",
    "der die das und ist nicht ein eine zu den mit von auf für sich",
    "le la les des et est une dans que pour qui pas sur du au",
    "el los las y es en que un una por con para no se del",
    "il di che è un per non una sono con del della i",
    "o os e que não uma para com do da em dos",
    "de het een en van is dat niet op te voor",
    "och att det som en på är av för inte med",
    "og at det er en på til av for ikke med",
    "ja on ei että se oli mutta kun myös ovat",
    "i w na nie się z do to że jest jak",
    "a se na je že v to s by jako není",
    "și în de la cu pe nu este care sau",
    "a az és hogy nem is egy van meg de",
    "ve bir bu da için ile de çok daha olarak",
    "og í að er það sem ekki",
    "un ka ir no ar ne par bet",
    "ir kad yra su į ne kaip",
    "i u je na da se su za nije",
    "dan yang di itu dengan untuk ini tidak dari",
    "và của là có không một được cho trong những",
    "na ya wa kwa ni katika za la",
    "ang ng sa na mga ay at",
    "и в не на что с как это по но",
    "і та не на що з як це до у",
    "и да не се на за од је",
    "το και η ο να είναι του της με για δεν",
    "في من على إلى أن هذا و لا ما التي",
    "و در به از که این را با است",
    "של את על לא הוא זה עם אני גם כי",
    "में है के की और से का को यह नहीं",
    "এবং এই না করে ও থেকে একটি",
    "이 그 및 수 것 있는 한 등 있다 은 는",
)
STOP_WORDS = frozenset(word for words in _BY_LANGUAGE for word in words.split())
