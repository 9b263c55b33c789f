"""The words that the synthetic text is made of."""

from __future__ import annotations


def _words(listing: str) -> tuple[str, ...]:
    return tuple(listing.split())


CITIES = _words("""
    Paris London Rome Madrid Berlin Vienna Lisbon Athens Dublin Oslo Stockholm Copenhagen Helsinki Warsaw Prague
    Budapest Brussels Amsterdam Geneva Zurich Milan Naples Turin Venice Florence Genoa Verona Bologna Palermo
    Seville Valencia Granada Malaga Toledo Bilbao Porto Coimbra Lyon Marseille Toulouse Bordeaux Nantes Lille
    Strasbourg Grenoble Dijon Munich Hamburg Cologne Dresden Leipzig Bremen Hanover Stuttgart Nuremberg Salzburg
    Graz Linz Innsbruck Krakow Gdansk Poznan Riga Vilnius Tallinn Minsk Kyiv Odessa Lviv Moscow Kazan Samara Tbilisi
    Yerevan Baku Ankara Istanbul Izmir Antalya Sofia Varna Bucharest Belgrade Zagreb Split Ljubljana Sarajevo Skopje
    Tirana Corfu Sparta Corinth Edinburgh Glasgow Aberdeen Belfast Cardiff Bristol Oxford Cambridge York Leeds
    Liverpool Manchester Sheffield Norwich Exeter Plymouth Cork Galway Limerick Bergen Uppsala Malmo Aarhus Odense
    Turku Reykjavik Boston Chicago Denver Seattle Portland Houston Dallas Austin Phoenix Atlanta Miami Orlando
    Detroit Cleveland Nashville Memphis Baltimore Toronto Montreal Ottawa Vancouver Calgary Winnipeg Halifax Quebec
    Havana Kingston Lima Cusco Quito Bogota Caracas Santiago Valparaiso Montevideo Asuncion Brasilia Recife Salvador
    Cordoba Rosario Mendoza Cairo Alexandria Luxor Tunis Algiers Rabat Fez Casablanca Dakar Accra Lagos Nairobi
    Mombasa Kampala Lusaka Harare Durban Pretoria Windhoek Luanda Kinshasa Jerusalem Haifa Beirut Damascus Amman
    Baghdad Basra Tehran Isfahan Shiraz Kabul Lahore Karachi Delhi Mumbai Kolkata Chennai Jaipur Agra Colombo
    Kathmandu Dhaka Yangon Bangkok Hanoi Saigon Manila Jakarta Bandung Singapore Taipei Beijing Shanghai Nanjing
    Hangzhou Xian Chengdu Harbin Seoul Busan Tokyo Kyoto Osaka Nagoya Kobe Sapporo Sendai Sydney Melbourne Brisbane
    Perth Adelaide Hobart Darwin Auckland Wellington
""")

QUALITIES_OF_BEINGS = _words("""
    old young quiet tall small large gentle patient curious careful honest tired cheerful silent famous strange
    clever brave kind proud humble lonely busy slow quick thirsty hungry
""")

QUALITIES_OF_THINGS = _words("""
    old bright dark small large narrow broad cold warm quiet heavy light green blue red grey golden silver wooden
    empty crowded distant hidden famous ordinary strange simple dusty clean broken new
""")

PERSONS = _words("""
    teacher sailor baker farmer doctor painter carpenter gardener librarian soldier merchant musician writer
    engineer fisherman shepherd tailor clerk judge miller potter weaver pilot nurse student traveller neighbour
    stranger child captain cook guard printer mason glazier
""")

THINGS = _words("""
    lamp table chair window door basket letter book map bottle clock candle blanket ladder hammer kettle mirror coat
    ribbon drum violin painting wheel boat cart bridge tower bell stone fence chest coin cup plate spoon rope wagon
    apple pear plum barrel cheese onion pumpkin
""")

PLACES = _words("""
    harbour market garden forest river mountain valley village church castle library school station kitchen cellar
    attic courtyard field meadow beach island lake road square bakery theatre museum orchard mill workshop inn cave
    hill
""")

ANIMALS = _words("""
    dog cat horse cow goat sheep fox wolf bear owl crow sparrow goose duck hen mouse rabbit deer frog bee trout
""")

MOTIONS = _words("""
    walked wandered hurried climbed sailed travelled returned marched crept drifted rode ran strolled limped
""")

ACTIONS = _words("""
    carried found lost painted repaired bought sold borrowed hid watched cleaned opened closed moved dropped admired
    described forgot remembered counted measured weighed broke mended copied
""")

SEASONS = _words("""
    spring summer autumn winter January March May July September November
""")

TIMES = (
    "in the morning",
    "at noon",
    "in the evening",
    "at night",
    "before dawn",
    "after the storm",
    "during the festival",
    "on Monday",
    "on Friday",
    "on Sunday",
    "every year",
    "for many years",
    "once again",
    "without a word",
)

ADVERBS = _words("""
    slowly quickly quietly carefully often seldom always gladly suddenly finally rarely together
""")

PREPOSITIONS = _words("""
    near behind beside above below inside outside beyond towards past across around
""")

SYLLABLES = _words("""
    ba be bi bo bu da de di do du fa fe fi ga ge go gu ha he ho ka ke ki ko la le li lo lu ma me mi mo na ne ni no
    nu pa pe po ra re ri ro ru sa se si so su ta te ti to tu va ve vi vo wa we za ze zo tha sha cho bran dor mir len
    ton var kel sur nor gal fen mar wick ford burg stad ville
""")
