"""Random sentences in sixteen languages and eight accents of English, for pretraining on synthesised speech.

A language has single words, commands about household things, statements (subject, verb, object), and questions and
small talk; numbers, years and times are filled in. Grammar need not be perfect: a unit LM should see the language's
sounds in phrases of every length. The texts were written for this project.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipelines.spoken_tasks import Line


class Wording(NamedTuple):
    """Texts of a language; each field is a comma-separated list.

    Attributes:
      words: single words.
      orders: commands with {} for a thing.
      things: objects of the commands.
      who, does, what: subjects, verbs and objects of statements.
      phrases: questions, answers, greetings, warnings; {n} is a number, {h} an hour, {m} a minute, {y} a year.
    """

    words: str
    orders: str
    things: str
    who: str
    does: str
    what: str
    phrases: str


ENGLISH = (
    "en-us", "en-gb-x-rp", "en-029", "en-gb-x-gbclan", "en-gb-scotland", "en", "en-us-nyc", "en-gb-x-gbcwmd",
)  # fmt: skip
WORDINGS: dict[str, Wording] = {
    "en": Wording(
        "yes, no, up, down, left, right, on, off, stop, go, forward, backward, follow, learn, visual, open, close, "
        "start, begin, end, pause, play, next, previous, back, help, cancel, confirm, repeat, louder, quieter, "
        "brighter, darker, faster, slower, hello, goodbye, please, thanks, sorry, maybe, never, always, today, "
        "tomorrow, yesterday, morning, noon, evening, night, monday, tuesday, wednesday, thursday, friday, saturday, "
        "sunday, january, february, march, april, june, july, august, september, october, november, december, red, "
        "green, blue, yellow, black, white, brown, purple, zero, one, two, three, four, five, six, seven, eight, "
        "nine, ten, eleven, twelve, twenty, hundred, thousand, bird, cat, dog, horse, sheep, house, tree, river, "
        "mountain, bread, butter, coffee, water, apple, orange, window, door, table, chair, kitchen, garden, school, "
        "doctor, teacher, music, paper, letter, yellowstone, elephant, umbrella, telephone, university, photograph, "
        "hospital",
        "turn on the {}, turn off the {}, switch on the {}, switch off the {}, put the {} on, put the {} away, "
        "turn the {} up, turn the {} down, make the {} louder, increase the {}, decrease the {}, raise the {}, "
        "lower the {}, more {} please, less {} please, start the {}, stop the {}, pause the {}, bring me the {}, "
        "fetch my {}, get the {}, take the {} to the bedroom, where is the {}, find my {}, show me the {}, "
        "check the {} in the kitchen, clean the {} in the washroom, open the {}, close the {}, lock the {}, "
        "is the {} still on, please set the {} to {n}, dim the {} in the living room, I need the {} now, "
        "could you move the {}, do not touch the {}, who took the {}, leave the {} alone",
        "lights, lamp, light, heat, heating, volume, music, radio, television, fan, oven, kettle, washing machine, "
        "front door, garage door, window, curtains, blinds, alarm, clock, newspaper, juice, socks, shoes, jacket, "
        "glasses, keys, phone, bedroom lights, kitchen lights, air conditioning, temperature, vacuum cleaner, coffee",
        "my mother, the neighbour, a young man, the old woman, our cousin, the captain, nobody, everyone, "
        "the children, a stranger, the baker, his sister, the mayor, two soldiers, the little boy, her friend, "
        "the singer, a tall girl, the whole team, my father, the farmer, that driver",
        "saw, painted, sold, lost, opened, found, cleaned, remembered, talked about, waited for, ran into, "
        "looked at, wanted, repaired, borrowed, carried home, never liked, wrote about, is thinking about, "
        "has eaten, will bring, would rather have, could not reach, took, heard about",
        "the bridge, an empty box, some fresh bread, the green door, a strange noise, the morning train, "
        "seven apples, their new kitchen, the longest day, a cup of tea, the blue bicycle, a broken chair, "
        "most of the money, the city by the sea, a book about birds, the first snow, dinner, the river, "
        "his black horse, a letter from the bank, the small island, another question, the radio in the car, "
        "a quiet place",
        "what time is it, how are you today, where do you live, see you tomorrow, good morning everyone, "
        "thank you very much, I do not know, that is not true, can you hear me, what is the weather like, "
        "will it rain on sunday, call me at {h} {m}, wake me up at {h}, set a timer for {n} minutes, "
        "my number is {n} {n} {n}, it was in {y}, the year {y}, it is {h} {m}, {n}, {n} {n}, room {n} please, "
        "the train leaves at {h} {m}, that costs {n} dollars, page {n}, I was born in {y}, "
        "it is {n} degrees outside, call an ambulance, watch your step, what is your name, how much is it, "
        "where is the station, excuse me, happy birthday, no problem at all, I am hungry, let us go home, "
        "wait a minute, who is there, speak up please, play the next song, skip this one, what is on my calendar, "
        "add milk to the list, read my messages, are you coming with us, why not, really, I think so, of course, "
        "never mind, that sounds good, well done",
    ),
    "de": Wording(
        "ja, nein, oben, unten, links, rechts, an, aus, halt, los, vorwärts, zurück, eins, zwei, drei, vier, fünf, "
        "sechs, sieben, acht, neun, zehn, Hund, Katze, Haus, Baum, Brot, Wasser, Fenster, Küche, Schule, Freund, "
        "Musik, rot, grün, blau, schwarz, Montag, Dienstag, Mittwoch, Donnerstag, Freitag, Januar, heute, morgen, "
        "gestern, bitte, danke, Krankenhaus, Geschwindigkeit, Schlüssel",
        "schalte {} ein, mach {} aus, hol mir {}, wo ist {}, zeig mir {}, stell {} leiser, ich brauche {}, "
        "bring {} in die Küche, ist {} noch an, öffne {} im Schlafzimmer, bitte prüfe {}",
        "das Licht, die Lampe, die Heizung, die Musik, den Fernseher, das Radio, die Zeitung, den Saft, die Schuhe, "
        "den Wecker, die Haustür, das Telefon",
        "mein Vater, die Nachbarin, das Kind, unser Lehrer, der alte Mann, meine Schwester, der Bäcker, niemand",
        "sieht, kauft, sucht, verkauft, findet, vergisst, malt, hört, erzählt von nichts als von, braucht",
        "das Haus am See, ein neues Auto, den letzten Brief, frisches Brot, die Brücke, einen heißen Kaffee, "
        "die ganze Stadt, zwei Äpfel, den Schnee, das grüne Buch",
        "wie spät ist es, wie geht es dir, guten Morgen, auf Wiedersehen, ich weiß es nicht, regnet es morgen, "
        "weck mich um {h} Uhr, es ist {h} Uhr {m}, {n}, {n} {n}, das kostet {n} Euro, im Jahr {y}, Zimmer {n} bitte, "
        "wo ist der Bahnhof, das macht nichts, kannst du mich hören, alles Gute zum Geburtstag, ich habe Hunger, "
        "warum nicht, wir fahren nach Hause, stell den Wecker auf {n} Minuten, sprich bitte langsamer",
    ),
    "fr": Wording(
        "oui, non, haut, bas, gauche, droite, marche, arrêt, avance, recule, un, deux, trois, quatre, cinq, six, "
        "sept, huit, neuf, dix, chien, chat, maison, arbre, pain, eau, fenêtre, cuisine, école, ami, musique, rouge, "
        "vert, bleu, noir, lundi, mardi, mercredi, jeudi, vendredi, janvier, aujourd'hui, demain, hier, merci, "
        "bonjour, bientôt, hôpital, grenouille, vitesse, clé",
        "allume {}, éteins {}, apporte-moi {}, où est {}, montre-moi {}, baisse {}, j'ai besoin de {}, "
        "mets {} dans la cuisine, ouvre {} de la chambre, vérifie {} s'il te plaît, ne touche pas {}",
        "la lumière, la lampe, le chauffage, la musique, la télévision, la radio, le journal, le jus, "
        "les chaussures, le réveil, la porte, le téléphone",
        "mon père, la voisine, l'enfant, notre professeur, le vieil homme, ma sœur, le boulanger, personne",
        "voit, achète, cherche, vend, trouve, oublie, peint, écoute, raconte, attend",
        "la maison au bord du lac, une nouvelle voiture, la dernière lettre, du pain frais, le pont, un café chaud, "
        "toute la ville, deux pommes, la neige, le livre vert",
        "quelle heure est-il, comment ça va, bonjour à tous, au revoir, je ne sais pas, est-ce qu'il va pleuvoir, "
        "réveille-moi à {h} heures, il est {h} heures {m}, {n}, {n} {n}, ça coûte {n} euros, en {y}, chambre {n}, "
        "où est la gare, ce n'est pas grave, tu m'entends, joyeux anniversaire, j'ai faim, pourquoi pas, "
        "on rentre à la maison, un minuteur de {n} minutes, parlez plus lentement",
    ),
    "es": Wording(
        "sí, no, arriba, abajo, izquierda, derecha, enciende, apaga, para, adelante, atrás, uno, dos, tres, cuatro, "
        "cinco, seis, siete, ocho, nueve, diez, perro, gato, casa, árbol, pan, agua, ventana, cocina, escuela, "
        "amigo, música, rojo, verde, azul, negro, lunes, martes, miércoles, jueves, viernes, enero, hoy, mañana, "
        "ayer, gracias, hola, quizás, hospital, velocidad, llave",
        "enciende {}, apaga {}, tráeme {}, dónde está {}, enséñame {}, baja {}, necesito {}, lleva {} a la cocina, "
        "abre {} del dormitorio, revisa {} por favor, no toques {}",
        "la luz, la lámpara, la calefacción, la música, la televisión, la radio, el periódico, el zumo, los zapatos, "
        "el despertador, la puerta, el teléfono",
        "mi padre, la vecina, el niño, nuestra maestra, el viejo, mi hermana, el panadero, nadie",
        "mira, compra, busca, vende, encuentra, olvida, pinta, escucha, cuenta, espera",
        "la casa junto al lago, un coche nuevo, la última carta, pan fresco, el puente, un café caliente, "
        "toda la ciudad, dos manzanas, la nieve, el libro verde",
        "qué hora es, cómo estás, buenos días a todos, hasta luego, no lo sé, va a llover mañana, "
        "despiértame a las {h}, son las {h} y {m}, {n}, {n} {n}, cuesta {n} euros, en {y}, habitación {n}, "
        "dónde está la estación, no pasa nada, me oyes, feliz cumpleaños, tengo hambre, por qué no, "
        "nos vamos a casa, un temporizador de {n} minutos, hable más despacio",
    ),
    "it": Wording(
        "sì, no, su, giù, sinistra, destra, acceso, spento, fermo, avanti, indietro, uno, due, tre, quattro, cinque, "
        "sei, sette, otto, nove, dieci, cane, gatto, casa, albero, pane, acqua, finestra, cucina, scuola, amico, "
        "musica, rosso, verde, azzurro, nero, lunedì, martedì, mercoledì, giovedì, venerdì, gennaio, oggi, domani, "
        "ieri, grazie, ciao, forse, ospedale, velocità, chiave",
        "accendi {}, spegni {}, portami {}, dov'è {}, mostrami {}, abbassa {}, mi serve {}, porta {} in cucina, "
        "apri {} della camera, controlla {} per favore, non toccare {}",
        "la luce, la lampada, il riscaldamento, la musica, la televisione, la radio, il giornale, il succo, "
        "le scarpe, la sveglia, la porta, il telefono",
        "mio padre, la vicina, il bambino, la nostra maestra, il vecchio, mia sorella, il fornaio, nessuno",
        "guarda, compra, cerca, vende, trova, dimentica, dipinge, ascolta, racconta, aspetta",
        "la casa sul lago, una macchina nuova, l'ultima lettera, il pane fresco, il ponte, un caffè caldo, "
        "tutta la città, due mele, la neve, il libro verde",
        "che ore sono, come stai, buongiorno a tutti, arrivederci, non lo so, domani piove, svegliami alle {h}, "
        "sono le {h} e {m}, {n}, {n} {n}, costa {n} euro, nel {y}, camera {n}, dov'è la stazione, non fa niente, "
        "mi senti, buon compleanno, ho fame, perché no, andiamo a casa, un timer di {n} minuti, parli più piano",
    ),
    "nl": Wording(
        "ja, nee, omhoog, omlaag, links, rechts, aan, uit, stop, vooruit, achteruit, een, twee, drie, vier, vijf, "
        "zes, zeven, acht, negen, tien, hond, kat, huis, boom, brood, water, raam, keuken, school, vriend, muziek, "
        "rood, groen, blauw, zwart, maandag, dinsdag, woensdag, donderdag, vrijdag, januari, vandaag, morgen, "
        "gisteren, bedankt, hallo, misschien, ziekenhuis, snelheid, sleutel",
        "doe {} aan, doe {} uit, breng me {}, waar is {}, laat {} zien, zet {} zachter, ik heb {} nodig, "
        "leg {} in de keuken, open {} van de slaapkamer, controleer {} alsjeblieft",
        "het licht, de lamp, de verwarming, de muziek, de televisie, de radio, de krant, het sap, de schoenen, "
        "de wekker, de voordeur, de telefoon",
        "mijn vader, de buurvrouw, het kind, onze leraar, de oude man, mijn zus, de bakker, niemand",
        "ziet, koopt, zoekt, verkoopt, vindt, vergeet, schildert, hoort, draagt, wil",
        "het huis aan het meer, een nieuwe auto, de laatste brief, vers brood, de brug, een hete koffie, "
        "de hele stad, twee appels, de sneeuw, het groene boek",
        "hoe laat is het, hoe gaat het met je, goedemorgen allemaal, tot ziens, ik weet het niet, gaat het regenen, "
        "maak me wakker om {h} uur, het is {h} uur {m}, {n}, {n} {n}, dat kost {n} euro, in het jaar {y}, kamer {n}, "
        "waar is het station, dat geeft niets, hoor je me, gefeliciteerd, ik heb honger, waarom niet, "
        "we gaan naar huis, zet de wekker op {n} minuten, praat wat langzamer",
    ),
    "lt": Wording(
        "taip, ne, aukštyn, žemyn, kairėn, dešinėn, įjunk, išjunk, stok, pirmyn, atgal, ačiū, stop, ratas, vienas, "
        "du, trys, keturi, penki, šeši, septyni, aštuoni, devyni, dešimt, šuo, katė, namas, medis, duona, vanduo, "
        "langas, virtuvė, mokykla, draugas, muzika, raudona, žalia, mėlyna, juoda, pirmadienis, antradienis, "
        "trečiadienis, sausis, šiandien, rytoj, vakar, labas, galbūt, ligoninė, greitis, raktas",
        "įjunk {}, išjunk {}, atnešk man {}, kur yra {}, parodyk {}, sumažink {}, man reikia {}, padėk {} virtuvėje, "
        "atidaryk {} miegamajame, prašau patikrink {}",
        "šviesą, lempą, šildymą, muziką, televizorių, radiją, laikraštį, sultis, batus, žadintuvą, duris, telefoną",
        "mano tėvas, kaimynė, vaikas, mūsų mokytoja, senas žmogus, mano sesuo, kepėjas, niekas",
        "mato, perka, ieško, parduoda, randa, pamiršta, piešia, girdi, neša, laukia",
        "namą prie ežero, naują automobilį, paskutinį laišką, šviežią duoną, tiltą, karštą kavą, visą miestą, "
        "du obuolius, sniegą, žalią knygą",
        "kiek dabar valandų, kaip sekasi, labas rytas visiems, iki pasimatymo, aš nežinau, ar rytoj lis, "
        "pažadink mane {h} valandą, dabar {h} valanda {m}, {n}, {n} {n}, tai kainuoja {n} eurų, {y} metais, "
        "kambarys {n}, kur yra stotis, nieko tokio, ar girdi mane, su gimtadieniu, aš alkanas, kodėl ne, "
        "einame namo, laikmatis {n} minučių, kalbėkite lėčiau",
    ),
    "ru": Wording(
        "да, нет, вверх, вниз, влево, вправо, включи, выключи, стоп, вперёд, назад, один, два, три, четыре, пять, "
        "шесть, семь, восемь, девять, десять, собака, кошка, дом, дерево, хлеб, вода, окно, кухня, школа, друг, "
        "музыка, красный, зелёный, синий, чёрный, понедельник, вторник, среда, четверг, пятница, январь, сегодня, "
        "завтра, вчера, спасибо, привет, возможно, больница, скорость, ключ",
        "включи {}, выключи {}, принеси мне {}, где {}, покажи {}, сделай тише {}, мне нужно {}, положи {} на кухне, "
        "открой {} в спальне, проверь {} пожалуйста",
        "свет, лампу, отопление, музыку, телевизор, радио, газету, сок, ботинки, будильник, дверь, телефон",
        "мой отец, соседка, ребёнок, наш учитель, старик, моя сестра, пекарь, никто не",
        "видит, покупает, ищет, продаёт, находит, забывает, рисует, слышит, несёт, ждёт",
        "дом у озера, новую машину, последнее письмо, свежий хлеб, мост, горячий кофе, весь город, два яблока, снег, "
        "зелёную книгу",
        "который час, как дела, доброе утро всем, до свидания, я не знаю, завтра будет дождь, "
        "разбуди меня в {h} часов, сейчас {h} часов {m} минут, {n}, {n} {n}, это стоит {n} рублей, в {y} году, "
        "комната {n}, где вокзал, ничего страшного, ты меня слышишь, с днём рождения, я хочу есть, почему бы и нет, "
        "мы едем домой, таймер на {n} минут, говорите медленнее",
    ),
    "pt": Wording(
        "sim, não, cima, baixo, esquerda, direita, liga, desliga, pare, frente, trás, um, dois, três, quatro, cinco, "
        "seis, sete, oito, nove, dez, cão, gato, casa, árvore, pão, água, janela, cozinha, escola, amigo, música, "
        "vermelho, verde, azul, preto, segunda-feira, terça-feira, quarta-feira, janeiro, hoje, amanhã, ontem, "
        "obrigado, olá, talvez, hospital, velocidade, chave",
        "liga {}, desliga {}, traz-me {}, onde está {}, mostra-me {}, baixa {}, preciso de {}, "
        "leva {} para a cozinha, abre {} do quarto, verifica {} por favor",
        "a luz, o candeeiro, o aquecimento, a música, a televisão, o rádio, o jornal, o sumo, os sapatos, "
        "o despertador, a porta, o telefone",
        "o meu pai, a vizinha, a criança, o nosso professor, o velho, a minha irmã, o padeiro, ninguém",
        "vê, compra, procura, vende, encontra, esquece, pinta, ouve, conta, espera",
        "a casa junto ao lago, um carro novo, a última carta, pão fresco, a ponte, um café quente, toda a cidade, "
        "duas maçãs, a neve, o livro verde",
        "que horas são, como estás, bom dia a todos, até logo, não sei, vai chover amanhã, acorda-me às {h}, "
        "são {h} e {m}, {n}, {n} {n}, custa {n} euros, em {y}, quarto {n}, onde fica a estação, não faz mal, "
        "ouves-me, feliz aniversário, tenho fome, porque não, vamos para casa, um temporizador de {n} minutos, "
        "fale mais devagar",
    ),
    "pl": Wording(
        "tak, nie, góra, dół, lewo, prawo, włącz, wyłącz, stój, naprzód, wstecz, jeden, dwa, trzy, cztery, pięć, "
        "sześć, siedem, osiem, dziewięć, dziesięć, pies, kot, dom, drzewo, chleb, woda, okno, kuchnia, szkoła, "
        "przyjaciel, muzyka, czerwony, zielony, niebieski, czarny, poniedziałek, wtorek, środa, czwartek, piątek, "
        "styczeń, dzisiaj, jutro, wczoraj, dziękuję, cześć, może, szpital, prędkość, klucz",
        "włącz {}, wyłącz {}, przynieś mi {}, gdzie jest {}, pokaż mi {}, ścisz {}, potrzebuję {}, "
        "połóż {} w kuchni, otwórz {} w sypialni, sprawdź {} proszę",
        "światło, lampę, ogrzewanie, muzykę, telewizor, radio, gazetę, sok, buty, budzik, drzwi, telefon",
        "mój ojciec, sąsiadka, dziecko, nasza nauczycielka, stary człowiek, moja siostra, piekarz, nikt nie",
        "widzi, kupuje, szuka, sprzedaje, znajduje, zapomina, maluje, słyszy, niesie, czeka na",
        "dom nad jeziorem, nowy samochód, ostatni list, świeży chleb, most, gorącą kawę, całe miasto, dwa jabłka, "
        "śnieg, zieloną książkę",
        "która godzina, jak się masz, dzień dobry wszystkim, do widzenia, nie wiem, czy jutro będzie padać, "
        "obudź mnie o {h}, jest {h} {m}, {n}, {n} {n}, to kosztuje {n} złotych, w {y} roku, pokój {n}, "
        "gdzie jest dworzec, nic nie szkodzi, słyszysz mnie, wszystkiego najlepszego, jestem głodny, czemu nie, "
        "jedziemy do domu, minutnik na {n} minut, proszę mówić wolniej",
    ),
    "sv": Wording(
        "ja, nej, upp, ner, vänster, höger, på, av, stopp, framåt, bakåt, ett, två, tre, fyra, fem, sex, sju, åtta, "
        "nio, tio, hund, katt, hus, träd, bröd, vatten, fönster, kök, skola, vän, musik, röd, grön, blå, svart, "
        "måndag, tisdag, onsdag, torsdag, fredag, januari, idag, imorgon, igår, tack, hej, kanske, sjukhus, "
        "hastighet, nyckel",
        "tänd {}, släck {}, hämta {}, var är {}, visa mig {}, sänk {}, jag behöver {}, lägg {} i köket, "
        "öppna {} i sovrummet, kontrollera {} tack",
        "ljuset, lampan, värmen, musiken, teven, radion, tidningen, juicen, skorna, väckarklockan, dörren, telefonen",
        "min pappa, grannen, barnet, vår lärare, den gamle mannen, min syster, bagaren, ingen",
        "ser, köper, söker, säljer, hittar, glömmer, målar, hör, bär, vill ha",
        "huset vid sjön, en ny bil, det sista brevet, färskt bröd, bron, varmt kaffe, hela staden, två äpplen, snön, "
        "den gröna boken",
        "hur mycket är klockan, hur mår du, god morgon allihop, vi ses, jag vet inte, blir det regn imorgon, "
        "väck mig klockan {h}, klockan är {h} och {m}, {n}, {n} {n}, det kostar {n} kronor, år {y}, rum {n}, "
        "var är stationen, det gör inget, hör du mig, grattis på födelsedagen, jag är hungrig, varför inte, "
        "vi åker hem, ställ klockan på {n} minuter, tala långsammare",
    ),
    "ar": Wording(
        "نعم, لا, فوق, تحت, يسار, يمين, تشغيل, إيقاف, قف, أمام, خلف, واحد, اثنان, ثلاثة, أربعة, خمسة, ستة, سبعة, "
        "ثمانية, تسعة, عشرة, كلب, قطة, بيت, شجرة, خبز, ماء, نافذة, مطبخ, مدرسة, صديق, موسيقى, أحمر, أخضر, أزرق, "
        "أسود, الاثنين, الثلاثاء, الأربعاء, الخميس, الجمعة, اليوم, غدا, أمس, شكرا, مرحبا, ربما, مستشفى, سرعة, مفتاح",
        "شغل {}, أطفئ {}, أحضر لي {}, أين {}, أرني {}, خفض {}, أحتاج {}, ضع {} في المطبخ, افتح {} في غرفة النوم",
        "الضوء, المصباح, التدفئة, الموسيقى, التلفاز, المذياع, الجريدة, العصير, الحذاء, المنبه, الباب, الهاتف",
        "أبي, الجارة, الطفل, معلمنا, الرجل العجوز, أختي, الخباز, لا أحد",
        "يرى, يشتري, يبحث عن, يبيع, يجد, ينسى, يرسم, يسمع, يحمل, ينتظر",
        "البيت قرب البحيرة, سيارة جديدة, الرسالة الأخيرة, خبزا طازجا, الجسر, قهوة ساخنة, المدينة كلها, تفاحتين, "
        "الثلج, الكتاب الأخضر",
        "كم الساعة, كيف حالك, صباح الخير, مع السلامة, لا أعرف, هل ستمطر غدا, أيقظني في الساعة {h}, "
        "الساعة {h} و {m} دقيقة, {n}, {n} {n}, الثمن {n} دينار, في عام {y}, غرفة رقم {n}, أين المحطة, لا بأس, "
        "هل تسمعني, عيد ميلاد سعيد, أنا جائع, لم لا, نذهب إلى البيت, تكلم ببطء",
    ),
    "fi": Wording(
        "kyllä, ei, ylös, alas, vasen, oikea, päälle, pois, seis, eteen, taakse, yksi, kaksi, kolme, neljä, viisi, "
        "kuusi, seitsemän, kahdeksan, yhdeksän, kymmenen, koira, kissa, talo, puu, leipä, vesi, ikkuna, keittiö, "
        "koulu, ystävä, musiikki, punainen, vihreä, sininen, musta, maanantai, tiistai, keskiviikko, tammikuu, "
        "tänään, huomenna, eilen, kiitos, terve, ehkä, sairaala, nopeus, avain",
        "sytytä {}, sammuta {}, tuo minulle {}, missä on {}, näytä {}, hiljennä {}, tarvitsen {}, vie {} keittiöön, "
        "avaa {} makuuhuoneessa",
        "valo, lamppu, lämmitys, musiikki, televisio, radio, lehti, mehu, kengät, herätyskello, ovi, puhelin",
        "isäni, naapuri, lapsi, opettajamme, vanha mies, siskoni, leipuri, kukaan ei",
        "näkee, ostaa, etsii, myy, löytää, unohtaa, maalaa, kuulee, kantaa, odottaa",
        "talon järven rannalla, uuden auton, viimeisen kirjeen, tuoretta leipää, sillan, kuuman kahvin, "
        "koko kaupungin, kaksi omenaa, lumen, vihreän kirjan",
        "mitä kello on, mitä kuuluu, hyvää huomenta kaikille, näkemiin, en tiedä, sataako huomenna, "
        "herätä minut kello {h}, kello on {h} {m}, {n}, {n} {n}, se maksaa {n} euroa, vuonna {y}, huone {n}, "
        "missä on asema, ei se mitään, kuuletko minua, hyvää syntymäpäivää, minulla on nälkä, miksi ei, "
        "menemme kotiin, ajastin {n} minuuttia",
    ),
    "tr": Wording(
        "evet, hayır, yukarı, aşağı, sol, sağ, aç, kapat, dur, ileri, geri, bir, iki, üç, dört, beş, altı, yedi, "
        "sekiz, dokuz, on, köpek, kedi, ev, ağaç, ekmek, su, pencere, mutfak, okul, arkadaş, müzik, kırmızı, yeşil, "
        "mavi, siyah, pazartesi, salı, çarşamba, ocak, bugün, yarın, dün, teşekkürler, merhaba, belki, hastane, hız, "
        "anahtar",
        "{} aç, {} kapat, bana {} getir, {} nerede, {} göster, {} kıs, bana {} lazım, {} mutfağa koy, "
        "lütfen {} kontrol et",
        "ışığı, lambayı, kaloriferi, müziği, televizyonu, radyoyu, gazeteyi, meyve suyunu, ayakkabıları, alarmı, "
        "kapıyı, telefonu",
        "babam, komşu, çocuk, öğretmenimiz, yaşlı adam, kız kardeşim, fırıncı, kimse",
        "göl kenarındaki evi, yeni bir araba, son mektubu, taze ekmek, köprüyü, sıcak bir kahve, bütün şehri, "
        "iki elma, karı, yeşil kitabı",
        "görüyor, alıyor, arıyor, satıyor, buluyor, unutuyor, çiziyor, duyuyor, taşıyor, bekliyor",
        "saat kaç, nasılsın, herkese günaydın, hoşça kal, bilmiyorum, yarın yağmur yağacak mı, "
        "beni saat {h} uyandır, saat {h} {m}, {n}, {n} {n}, fiyatı {n} lira, {y} yılında, oda {n}, istasyon nerede, "
        "önemli değil, beni duyuyor musun, iyi ki doğdun, açım, neden olmasın, eve gidiyoruz, "
        "{n} dakika sonra hatırlat",
    ),
    "cs": Wording(
        "ano, ne, nahoru, dolů, vlevo, vpravo, zapni, vypni, stůj, vpřed, zpět, jedna, dva, tři, čtyři, pět, šest, "
        "sedm, osm, devět, deset, pes, kočka, dům, strom, chléb, voda, okno, kuchyně, škola, přítel, hudba, červená, "
        "zelená, modrá, černá, pondělí, úterý, středa, leden, dnes, zítra, včera, děkuji, ahoj, možná, nemocnice, "
        "rychlost, klíč",
        "zapni {}, vypni {}, přines mi {}, kde je {}, ukaž mi {}, ztlum {}, potřebuji {}, polož {} v kuchyni, "
        "otevři {} v ložnici",
        "světlo, lampu, topení, hudbu, televizi, rádio, noviny, džus, boty, budík, dveře, telefon",
        "můj otec, sousedka, dítě, naše učitelka, starý muž, moje sestra, pekař, nikdo",
        "vidí, kupuje, hledá, prodává, nachází, zapomíná, maluje, slyší, nese, čeká na",
        "dům u jezera, nové auto, poslední dopis, čerstvý chléb, most, horkou kávu, celé město, dvě jablka, sníh, "
        "zelenou knihu",
        "kolik je hodin, jak se máš, dobré ráno všem, na shledanou, nevím, bude zítra pršet, vzbuď mě v {h}, "
        "je {h} hodin {m} minut, {n}, {n} {n}, stojí to {n} korun, v roce {y}, pokoj {n}, kde je nádraží, to nevadí, "
        "slyšíš mě, všechno nejlepší, mám hlad, proč ne, jedeme domů, minutka na {n} minut",
    ),
    "hi": Wording(
        "हाँ, नहीं, ऊपर, नीचे, बाएँ, दाएँ, चालू, बंद, रुको, आगे, पीछे, एक, दो, तीन, चार, पाँच, छह, सात, आठ, नौ, दस, "
        "कुत्ता, बिल्ली, घर, पेड़, रोटी, पानी, खिड़की, रसोई, स्कूल, दोस्त, संगीत, लाल, हरा, नीला, काला, सोमवार, "
        "मंगलवार, बुधवार, आज, कल, धन्यवाद, नमस्ते, शायद, अस्पताल, गति, चाबी",
        "{} चालू करो, {} बंद करो, मुझे {} लाओ, {} कहाँ है, {} दिखाओ, {} कम करो, मुझे {} चाहिए, {} रसोई में रखो",
        "बत्ती, लैंप, हीटर, संगीत, टीवी, रेडियो, अखबार, रस, जूते, अलार्म, दरवाज़ा, फ़ोन",
        "मेरे पिता, पड़ोसी, बच्चा, हमारे शिक्षक, बूढ़ा आदमी, मेरी बहन, कोई नहीं",
        "झील के पास का घर, नई गाड़ी, आखिरी चिट्ठी, ताज़ी रोटी, पुल, गरम कॉफ़ी, पूरा शहर, दो सेब, बर्फ़, हरी किताब",
        "देखता है, खरीदता है, ढूँढता है, बेचता है, भूल जाता है, बनाता है, सुनता है, उठाता है",
        "क्या समय हुआ है, आप कैसे हैं, सबको नमस्ते, फिर मिलेंगे, मुझे नहीं पता, क्या कल बारिश होगी, "
        "मुझे {h} बजे जगाओ, {h} बजकर {m} मिनट, {n}, {n} {n}, इसका दाम {n} रुपये है, सन {y}, कमरा {n}, "
        "स्टेशन कहाँ है, कोई बात नहीं, जन्मदिन मुबारक, मुझे भूख लगी है, क्यों नहीं, घर चलो",
    ),
}  # fmt: skip
OTHERS = tuple(language for language in WORDINGS if language != "en")
LANGUAGES = (*ENGLISH, *OTHERS)


def _listed(text: str) -> list[str]:
    return [one.strip() for one in text.split(",")]


_LISTS = {language: Wording(*map(_listed, wording)) for language, wording in WORDINGS.items()}  # type: ignore[arg-type]


def sentence(language: str, rng: np.random.Generator) -> str:
    """Draws a text in one of `LANGUAGES`: one or two words, a command, a statement, a phrase, or two of these."""
    if rng.random() < 0.1:
        return f"{_one(language, rng)}, {_one(language, rng)}"
    return _one(language, rng)


def _one(language: str, rng: np.random.Generator) -> str:
    lists = _LISTS["en" if language in ENGLISH else language]

    def pick(part: str) -> str:
        options = getattr(lists, part)
        return options[int(rng.integers(len(options)))]

    kind = rng.choice(["words", "pairs", "orders", "statement", "phrases"], p=[0.22, 0.08, 0.25, 0.25, 0.2])
    if kind == "words":
        return pick("words")
    if kind == "pairs":
        return f"{pick('words')} {pick('words')}"
    if kind == "statement":
        return f"{pick('who')} {pick('does')} {pick('what')}"
    text = pick("phrases")
    if kind == "orders":
        text = pick("orders").replace("{}", pick("things"))
    for mark, number in _numbers(rng):
        while mark in text:
            text = text.replace(mark, str(next(number)), 1)
    return text


def _numbers(rng: np.random.Generator) -> Iterator[tuple[str, Iterator[int]]]:
    """Yields each number placeholder of a phrase with an endless iterator of random values for it."""
    draws = {
        "{n}": lambda: int(10 ** rng.uniform(0, 3.3)),
        "{h}": lambda: int(rng.integers(1, 24)),
        "{m}": lambda: int(rng.integers(1, 60)),
        "{y}": lambda: int(rng.integers(1750, 2050)),
    }
    for mark, draw in draws.items():
        yield mark, iter(draw, None)


def line(language: str, rng: np.random.Generator) -> Line:
    """Draws an utterance in a language, with random rate, pitch range and noise level."""
    low = float(rng.uniform(5, 30))
    rate, width = int(rng.integers(110, 240)), int(rng.integers(10, 90))
    return Line(
        (language,), sentence(language, rng), language, "", (low, low + 10), (rate, rate + 1), (width, width + 1)
    )
