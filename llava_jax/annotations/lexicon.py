"""Word lists for the light chunker of phrases.py: English words that are not what their endings say."""

WORDS = {  # the letters are explained in phrases.py; no word is in two of these lists
    "E": "a an",
    "F": "every her his its my our the their whose your",
    "D": """
        all another any both each either few many much neither no several some such these this those various what
        which""",
    "R": """
        anybody anyone anything everybody everyone everything he hers herself him himself i it itself me mine myself
        nobody none nothing ones ours ourselves she somebody someone something theirs them themselves they us we you
        yours yourself""",
    "W": """
        after although because before by for how if let once since that though unless until when where whether while
        whilst who whom why without""",
    "P": """
        aboard about above abroad according across again against ago ahead almost alone along alongside already also
        always amid among amongst anywhere apart around as ashore aside at atop away backward backwards behind below
        beneath beside besides between beyond but despite down downfield downhill downstairs downwards due during
        else enough even ever everywhere except forward forwards from here however in including indoors instead into
        just later like maybe near never nor not now of off often on onto out outdoors over overboard past per
        perhaps please rather sometimes somewhere soon still than then there through throughout today together
        tomorrow tonight toward towards under underneath up uphill upon upstairs upwards usually versus via vs well
        with within yesterday yet""",
    "T": "can cannot could did do does may might must shall should to will would",
    "C": "& and or",
    "S": "'s",
    "A": "approximately extremely freshly less more most nearly newly only quite really so too very",
    "B": """
        am are be became become becomes becoming been being get gets getting got had has have having is remain
        remained remains seem seemed seems was were""",
    "M": """
        billion dozen eight eleven fifteen fifty five forty four fourteen hundred million nine one seven six ten
        thirteen thirty thousand three twelve twenty two zero""",
    "J": """
        abandoned adjacent afraid alive amazing ancient angry antique asleep athletic awake aware bad bald bare
        barefoot beloved best better big bitter black blank blond blonde blue bold bored brave breathtaking bright
        brilliant british broken brown brunette busy calm central certain charming cheap chinese clear clever closed
        cloudy cold common complex contemporary cool crazy creamy crispy crowded curly current cute daily danish
        dark dead decent deep delicate deserted different dirty distant double dry dusty dutch early eastern easy
        elderly elegant empty english entire excellent excited exciting extra fake false familiar fancy fifth fine
        first flat floral fluffy fluorescent foggy former fourth free french fresh friendly full funny furry gentle
        german giant glossy golden good gorgeous grand grassy gray great green grey hairy handsome happy hard
        healthy heavy high hilly holy hot huge human ill immediate inner innocent inspiring interesting intricate
        irish japanese juicy large last late lazy left light likely liquid little lively local lonely long loud
        lovely low lower lush magnificent main major matte mature medieval messy minor misty modern monthly muddy
        naked narrow nearby neat new next nice normal northern odd old olympic opaque open orange ordinary organic
        ornate other outer outstanding own pale perfect permanent pink pleasant polish polite poor popular
        portuguese pregnant premium pretty previous private proud public purple quiet ragged rainy rare raw ready
        real rear recent red refreshing regular relaxing remote retired rich right ripe rocky rough royal rude
        rugged rural rusty sacred sad safe salty same sandy scared second separate sexy sharp shiny short shy sick
        silent silly silver similar simple single small smart smooth snowy soft solid sour southern spanish special
        spicy stale steady steep stormy stout strange strong stunning stupid sturdy sunny surprised surprising
        swedish sweet tall tasty thick thin third tiny tired touching tough transparent trendy tropical true turkish
        ugly ultimate unable unique unlikely upper urban vegan vegetarian vibrant vietnamese violent vivid warm weak
        wealthy weekly weird western wet white whole wicked wide wild windy wise wooden woolen worried worst worth
        yearly yellow""",
    "h": """
        aging back barking blinking blooming boiling burning crying dancing dying existing fading falling fighting
        flashing floating flowering flowing flying folding glowing grazing growing hanging howling inside laughing
        living loving matching melting missing moving outside playing remaining rising roaring rolling rotating
        running sailing screaming shining singing sitting sleeping sliding smiling soaring sparkling spinning
        standing surrounding swimming towering twinkling visiting walking winding working""",
    "e": """
        baked based built capped carved clad coated colored coloured covered crafted drawn drenched dried encrusted
        filled flavored flavoured fried grilled held infested inspired kissed knitted lined lit made owned painted
        powered roasted sewn shaped sized soaked striped studded themed topped trimmed woven""",
    "N": """
        adhesive adult advertising ally alternative anomaly archive arctic assembly atlas attic baking banking bed
        bedding bee belly bible bowling boxing building bully butterfly cable camping canvas ceiling ceramic cheese
        christmas climbing clinic clothing coffee collective committee cooking copy cosmetic critic crossing cycling
        darling deer degree detective dining dish diving drawing duckling dumpling earring employee engineering
        evening executive fabric family feed fish fishing flooring front gardening garlic gas gathering geese
        graphic half hiking housing initiative italy jelly jogging july kayaking king knee landing lens lighting
        lily locomotive logic magic marketing mars mechanic meeting middle monopoly morning mosaic motive music
        native news offering official opening outing packaging painting parking perspective picnic plain plastic
        professional pudding racing radish railing rally reed rental reply representative republic ring sail seed
        series setting sewing shed sheep shopping sibling side skating skiing sled sling species sports spring
        square stable sting stocking string supply surfing swing table texas thing top topic traffic trainee
        training tree vegetable wedding weed wing wiring wrestling""",
    "L": """
        businessmen businesswomen calves cattle children fans feet firemen fishermen folks gentlemen guys halves
        kids knives ladies lives loaves men mice oxen people police policemen scarves shelves sportsmen teeth
        thieves wives wolves women""",
    "H": """
        actor actress artist athlete author boy bride businessman businesswoman celebrity coach comedian dancer
        director driver drummer farmer father girl goalkeeper groom guitarist guy husband lady man minister mother
        musician officer person player politician president prince princess quarterback queen singer soldier striker
        student teacher wife woman worker""",
}
# Verbs alone; in -s too.
VERBS = """
    accept accompany act add admire adopt adorn afford allow announce appear applaud apply appreciate approach arise
    arrange arrest arrive ask assemble attach attend avoid await bake bask bear beat begin believe belong bite blow
    boast boil borrow bounce breathe bring build burst buy carry cascade cast catch cause celebrate chase cheer chew
    choose chop climb cling collapse collect combine come commemorate compete compose congratulate connect consider
    consist construct contain continue crawl create crouch crush cry cuddle dangle decide decorate defeat defend
    deliver demolish depart depict descend describe destroy develop devour die dig dip disappear discover discuss
    disembark divide dominate donate drag draw dribble drown eat embrace emerge enable enclose encourage engage
    engulf enhance enjoy enter erupt escape escort evacuate examine exceed exist expand expect explain explode
    explore express extend feed feel fill find finish flank flap flee forage forget forgive freeze frolic fry gallop
    gather gaze generate give glance glide glitter go grab graze greet grind grow hang happen hate haul hear hold
    honour hover hug identify ignite illuminate illustrate imagine improve inaugurate include increase indicate
    inhabit inspect inspire install introduce investigate invite involve join juggle keep kick kneel know laugh lean
    leap learn lend lick lie listen lose lurk maintain make mingle munch nestle nibble nod obscure observe obtain
    occur overlook oversee owe own participate peek peel peer perceive perform persuade pluck portray pose possess
    pounce practise pray prefer prepare preserve prevail prevent proclaim produce promise protect protrude prove
    provide publish pull purchase pursue put quit react read realise realize receive recite recline recognise
    recognize recover reduce reflect refuse rehearse relate rely remember remind remove renovate repair replace
    represent rescue resemble resume reunite reveal roam saddle save say scratch scream seize select sell send serve
    settle shine shout shrug sing sink sip sit sniff snuggle soak soar solve speak spend spread sprinkle stand stare
    stir stroke stroll succeed suffer suggest sunbathe surrender surround survive swallow swim swoop take teach tell
    thank think threaten throw undergo understand unite unpack unveil utilise utilize vanish wade wait wake wander
    warn wash wear whisper wilt win wipe wrap write yawn yell""".split()
# Verbs that are nouns too; those in -s are verbs first.
VERBS_FIRST = """
    bend clean crack dance drink fall fly help hike hunt jog jump lead look love march move nap need paddle pass
    play point push relax rest ride roll run set skate ski sleep smile spin start stay stop stretch surf talk travel
    turn twist walk want work""".split()
# Nouns that are verbs too; those in -s are nouns first.
NOUNS_FIRST = """
    address aim anchor answer arch attack attempt award back balance bark bat battle blast block bloom bow bowl
    brand break brush burn call camp care chain change charge chill circle claim clap cloud comb control cook cost
    cover crash cross crowd crown cup curve cut damage dawn deal demand document dream dress drive drop exit face
    feature field fight figure film fire flash float flower fold frame gift glow grill guard guide hail hand head
    highlight hit honor host interview joke kiss land launch leave lift light limit mark mask mass match measure
    milk model name offer order pack paint parade park peak perch photograph pick picture place plan plant pour
    present press protest race rain rally reach release report return review ring rise rock rule rush salute score
    scramble search seat shake shape share shelter shoot shot show shower sign signal slice slide smoke snack sound
    splash sport spot spray sprout stack stage stain star steam steer step storm strike strip study support surprise
    switch tackle target taste test tie touch tour tower trade trail train transport trap treat trick trip tumble
    use view visit vote watch wave welcome whip wish wonder wreck yield""".split()
PAST = """
    appeared ate began blew bought broke brought came caught chose died dies drank drew drove dug fed fell felt flew
    fought found froze gave grew heard hung kept knew lay led lies looked lost lying met paid ran rang rode said
    sang sank sat saw sent shone shook slept sold sought spent spoke stole stood struck stuck swam swung taught
    thought threw told took tore went woke won wore wrote""".split()
PARTICIPLES = """
    beaten begun bitten blown born burnt chosen done driven drunk eaten flown forgotten frozen given gone gotten
    grown held hidden hurt known laid learnt left ridden seen shown spoken stolen sung sunk sworn taken thrown torn
    woken worn written""".split()
ADJECTIVE_ENDINGS = ("ous", "ful", "less", "ive", "ical", "ional", "tial", "cial", "ural", "ental", "ic", "able",
                     "ible", "ish", "some", "esque", "ese")
