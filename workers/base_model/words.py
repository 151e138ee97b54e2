"""The vocabulary of the generated corpus: plain word lists, no code.

Written for this project, so the corpus has no licence but the project's own.
"""

# ruff: noqa: SIM905 (a list of words reads better as words)

ONSETS = (
    "b br c ch cl d dr f fl g gl gr h j k kl kr l m n p pl pr qu r s sh sk st t th tr v vr w x y z"
).split()
VOWELS = "a e i o u ai ea ei ia io oa ou y".split()
CODAS = "l m n r s t x k nd rn th sk ld".split() + [""] * 9

ATTRIBUTES = (
    "owner author maintainer founder capital port version licence password colour price weight "
    "height age size language currency leader teacher doctor captain colour code name address "
    "number timeout limit default format encoding prefix suffix extension path folder host key "
    "token title editor publisher inventor designer river mountain flower animal bird dish drink "
    "song game sport tool engine fuel material shape sound smell season month motto symbol flag "
    "hash checksum salt seed score rank level depth width speed distance temperature budget fee "
    "deadline birthday hometown nickname mascot supplier customer partner rival successor origin"
).split()
ADJECTIVES = (
    "main first last new old usual favourite official public private internal external local "
    "remote secret current next best common default maximum minimum total average typical"
).split()
# (statement, question about the value, another question, short question)
RELATIONS = (
    ("{e} was founded by {v}.", "Who founded {e}?", "Which person started {e}?"),
    ("{e} was invented by {v}.", "Who invented {e}?", "Whose invention is {e}?"),
    ("{e} was written by {v}.", "Who wrote {e}?", "Which writer created {e}?"),
    ("{e} was built in {y}.", "When was {e} built?", "In which year did they build {e}?"),
    ("{e} was released in {y}.", "When was {e} released?", "What year did {e} come out?"),
    ("{e} was born in {y}.", "When was {e} born?", "In which year did {e} come to the world?"),
    ("{e} lives in {v}.", "Where does {e} live?", "In which place is {e} at home?"),
    ("{e} works for {v}.", "Who does {e} work for?", "Which company employs {e}?"),
    ("{e} is located in {v}.", "Where is {e} located?", "Where can I find {e}?"),
    ("{e} depends on {v}.", "What does {e} depend on?", "Which package does {e} need?"),
    (
        "{e} is written in {v}.",
        "What is {e} written in?",
        "Which language did they use to write {e}?",
    ),
    ("{e} listens on port {n}.", "Which port does {e} listen on?", "What port is {e} using?"),
    ("{e} costs {n} coins.", "How much does {e} cost?", "How many coins do I pay for {e}?"),
    ("{e} has {n} members.", "How many members does {e} have?", "How many people are in {e}?"),
    ("{e} speaks {v}.", "Which language does {e} speak?", "In which language can I talk to {e}?"),
    ("{e} is made of {v}.", "What is {e} made of?", "Which material is {e} made from?"),
    ("{e} was replaced by {v}.", "What replaced {e}?", "What came after {e}?"),
    ("{e} returns {v}.", "What does {e} return?", "What do I get back from {e}?"),
    (
        "{e} stores its data in {v}.",
        "Where does {e} store its data?",
        "Where are the data of {e} saved?",
    ),
    ("{e} is married to {v}.", "Who is {e} married to?", "Who is the husband or wife of {e}?"),
    ("{e} belongs to {v}.", "Who does {e} belong to?", "Whose is {e}?"),
    ("{e} is used for {v}.", "What is {e} used for?", "What purpose does {e} serve?"),
    ("{e} likes {v}.", "What does {e} like?", "What is {e} fond of?"),
    ("{e} opens at {n}.", "When does {e} open?", "At what time can I visit {e}?"),
)
KINDS = (
    "city town river mountain island village planet lake castle ship company library module "
    "package function service server project school museum team band book game robot machine "
    "painter singer writer scientist engineer farmer king queen horse dog cat tree market bridge"
).split()

# verb, third person, gerund
VERBS = tuple(
    tuple(line.split("/"))
    for line in """
add/adds/adding
append/appends/appending
build/builds/building
cancel/cancels/cancelling
change/changes/changing
check/checks/checking
clear/clears/clearing
close/closes/closing
compare/compares/comparing
compress/compresses/compressing
compute/computes/computing
connect/connects/connecting
convert/converts/converting
copy/copies/copying
count/counts/counting
create/creates/creating
decode/decodes/decoding
delete/deletes/deleting
display/displays/displaying
download/downloads/downloading
encode/encodes/encoding
execute/executes/executing
expand/expands/expanding
extract/extracts/extracting
filter/filters/filtering
find/finds/finding
format/formats/formatting
generate/generates/generating
get/gets/getting
group/groups/grouping
import/imports/importing
insert/inserts/inserting
install/installs/installing
iterate over/iterates over/iterating over
join/joins/joining
list/lists/listing
load/loads/loading
lock/locks/locking
match/matches/matching
merge/merges/merging
move/moves/moving
normalize/normalizes/normalizing
open/opens/opening
parse/parses/parsing
print/prints/printing
read/reads/reading
register/registers/registering
release/releases/releasing
remove/removes/removing
rename/renames/renaming
replace/replaces/replacing
reset/resets/resetting
resolve/resolves/resolving
restart/restarts/restarting
reverse/reverses/reversing
save/saves/saving
scan/scans/scanning
search/searches/searching
select/selects/selecting
send/sends/sending
set/sets/setting
show/shows/showing
sort/sorts/sorting
split/splits/splitting
start/starts/starting
stop/stops/stopping
store/stores/storing
test/tests/testing
update/updates/updating
upload/uploads/uploading
validate/validates/validating
verify/verifies/verifying
wait for/waits for/waiting for
wrap/wraps/wrapping
write/writes/writing
""".split("\n")
    if line
)
# singular/plural
NOUNS = tuple(
    tuple(line.split("/"))
    for line in """
address/addresses
archive/archives
argument/arguments
array/arrays
attribute/attributes
branch/branches
buffer/buffers
byte/bytes
certificate/certificates
change/changes
character/characters
class/classes
client/clients
column/columns
command/commands
comment/comments
commit/commits
configuration/configurations
connection/connections
container/containers
database/databases
date/dates
device/devices
dictionary/dictionaries
directory/directories
document/documents
element/elements
email/emails
entry/entries
error/errors
event/events
exception/exceptions
expression/expressions
field/fields
file/files
filter/filters
folder/folders
format/formats
function/functions
group/groups
handler/handlers
header/headers
host/hosts
image/images
index/indexes
instance/instances
integer/integers
interface/interfaces
item/items
job/jobs
key/keys
label/labels
library/libraries
line/lines
link/links
list/lists
log/logs
message/messages
method/methods
module/modules
name/names
network/networks
node/nodes
number/numbers
object/objects
option/options
package/packages
page/pages
parameter/parameters
partition/partitions
password/passwords
path/paths
pattern/patterns
permission/permissions
pipeline/pipelines
pointer/pointers
port/ports
process/processes
project/projects
property/properties
query/queries
queue/queues
record/records
repository/repositories
request/requests
resource/resources
response/responses
result/results
row/rows
schedule/schedules
script/scripts
section/sections
segment/segments
sequence/sequences
server/servers
service/services
session/sessions
signal/signals
socket/sockets
source/sources
stream/streams
string/strings
symbol/symbols
system/systems
table/tables
tag/tags
task/tasks
template/templates
test/tests
thread/threads
token/tokens
type/types
update/updates
user/users
value/values
variable/variables
version/versions
video/videos
widget/widgets
window/windows
word/words
""".split("\n")
    if line
)
QUALIFIERS = (
    "given specified current new existing empty temporary remote local default internal hidden "
    "nested next previous first last valid invalid open closed unique sorted random binary "
    "regular active available missing optional selected original compressed text input output"
).split()
TAILS = (
    "in place",
    "in reverse order",
    "in the current directory",
    "in the background",
    "on the standard output",
    "from the standard input",
    "from a file",
    "into a new list",
    "to a file",
    "one at a time",
    "without changing the original",
    "if it does not exist",
    "if it exists",
    "and all of its contents",
    "with the given name",
    "with a specific format",
    "by name",
    "by their keys",
    "as a string",
    "as a tuple",
    "as bytes",
    "until the end is reached",
    "using a regular expression",
    "recursively",
    "between two dates",
    "for the current user",
    "before the process exits",
    "after a timeout in seconds",
)
EXTRAS = (
    "Return None if there is nothing to do.",
    "Return True on success, False otherwise.",
    "Raise ValueError if the argument is not valid.",
    "Raise KeyError if it is not found.",
    "Raise TypeError for any other type.",
    "The default is None.",
    "The result is a new object.",
    "The order is not guaranteed.",
    "This is equivalent to calling the method in a loop.",
    "If the argument is omitted, the default is used.",
    "It is safe to call this from several threads.",
    "Note that the original is left unchanged.",
)
TOOLS = (
    "archive box build cap chart clip cloud curl diff disk dock draw find flow fmt git grab grep "
    "hex http image json kube lint log mail make mount net note npm pack pip pkg play port proc "
    "query scan shell sort ssh stat store sync tar task tel time trace tree user video view watch "
    "web wget xml zip"
).split()
EXTENSIONS = "txt json csv tar.gz py log zip png html yaml md xml".split()

GLOSSARY = tuple(
    tuple(line.split(": ", 1))
    for line in """
algorithm: A finite list of exact steps that solves a problem.
API: A set of functions through which one program uses another.
argument: A value that is passed to a function when it is called.
array: A sequence of elements that are stored side by side and reached by index.
assertion: A statement that must be true; if it is not, the program stops with an error.
backup: A copy of data that is kept in case the original is lost.
bit: The smallest unit of information, either zero or one.
boolean: A value that is either true or false.
branch: A line of development in a repository that can later be merged.
browser: A program that loads pages from the web and displays them.
buffer: A region of memory that holds data on its way from one place to another.
bug: A mistake in a program that makes it behave in a wrong way.
byte: A group of eight bits.
cache: A small and fast store for results that are likely to be needed again.
checksum: A short value computed from data, used to find out whether the data changed.
class: A description of objects that share the same attributes and methods.
client: A program that sends requests to a server.
cluster: A group of machines that work together as one.
comment: A note in the source code that the computer ignores.
compiler: A program that translates source code into machine code.
compression: A way to store the same data in fewer bytes.
constant: A name whose value never changes.
container: An isolated environment that holds a program and all that it needs.
cookie: A small piece of data that a web site stores in the browser.
coroutine: A function that can pause, let others run, and continue later.
database: An organised collection of data that can be searched and changed.
deadlock: A state in which two tasks wait for each other forever.
debugger: A tool that runs a program step by step to find mistakes.
decorator: A function that takes another function and extends what it does.
dependency: A package that another package needs in order to work.
dictionary: A collection of values, each of which is found by its key.
directory: A named place that holds files and other directories.
encryption: A way to hide a message so that only the holder of the key can read it.
event: A record of something that happened at a certain time.
exception: An error that interrupts the normal flow and can be handled.
file: A named sequence of bytes that is kept on a disk.
firewall: A filter that decides which network traffic may pass.
float: A number with a fractional part, stored with limited precision.
function: A named block of code that takes arguments and returns a result.
generator: A function that yields a sequence of values one at a time.
gradient: The direction in which a function grows fastest.
graph: A set of nodes joined by edges.
hash: A value of fixed size computed from data of any size.
heap: A tree in which every parent is smaller than its children.
index: A number that says where an element stands in a sequence.
integer: A whole number, positive, negative or zero.
interface: A list of the methods that a class promises to have.
interpreter: A program that reads source code and runs it directly.
iterator: An object that gives its elements one after the other.
kernel: The core of an operating system, which controls the hardware.
key: A value that identifies a record or opens a lock.
lambda: A small function without a name.
ledger: A book in which every payment is written and none is erased.
library: A collection of code that other programs can use.
licence: A text that says what others may do with a work.
link: A reference from one file or page to another.
list: An ordered collection of elements that can be changed.
lock: An object that lets only one thread at a time enter a section of code.
log: A file in which a program records what it did and when.
loop: A block of code that is repeated while a condition holds.
memory: The place where a running program keeps its data.
method: A function that belongs to an object.
model: A function with many parameters that were learned from data.
module: A file of code that can be imported by other code.
network: A group of computers that can send messages to each other.
object: A value that has a type, attributes and methods.
operator: A symbol such as plus or minus that combines values.
package: A folder of modules that is installed as one unit.
parameter: A name in the definition of a function that receives an argument.
parser: A program that turns text into a structure.
password: A secret word that proves who someone is.
path: A text that says where a file is found.
permission: A rule that says who may read, write or run a file.
pipe: A channel that passes the output of one program to another.
pointer: A value that holds the address of another value.
port: A number that tells which service on a host a message is for.
process: A program that is running.
protocol: A set of rules for the exchange of messages.
proxy: A server that passes requests on to another server.
query: A question that is sent to a database.
queue: A collection in which the first element added is the first one removed.
recursion: A method in which a function calls itself on a smaller problem.
repository: A place where the files of a project and their history are kept.
router: A device that decides where each packet goes next.
scheduler: A program that decides which task runs next.
schema: A description of the fields that a record must have.
script: A short program that is run by an interpreter.
semaphore: A counter that limits how many tasks may use a resource at once.
server: A program that waits for requests and answers them.
session: The time between a login and a logout.
set: A collection in which every element occurs only once.
shell: A program that reads commands and runs them.
signature: A value that proves who wrote a message and that it was not changed.
socket: One end of a connection between two programs.
sorting: The task of putting elements into order.
stack: A collection in which the last element added is the first one removed.
string: A sequence of characters.
symlink: A file that points to another file.
syntax: The rules that say how a program must be written.
table: A set of rows that all have the same columns.
template: A text with gaps that are filled in later.
terminal: A window in which commands are typed and their output is shown.
test: A piece of code that checks whether other code does what it should.
thread: A part of a process that runs at the same time as other parts.
timeout: The longest time that a program waits before it gives up.
token: A short piece of text that a model reads or writes as one unit.
transaction: A group of changes that happen all together or not at all.
tree: A structure in which every node but the root has one parent.
tuple: An ordered collection of elements that cannot be changed.
variable: A name that refers to a value.
version: A number that tells one release of a program from another.
virtual machine: A computer that is simulated by a program.
widget: A visible part of a window, such as a button.
wrapper: A function whose main purpose is to call another one.
""".split("\n")
    if line
)

SMALL_TALK = tuple(
    tuple(line.split(" / "))
    for line in """
Hello! / Hello! How can I help you?
Hi / Hello! How can I help you?
Good morning / Good morning! What can I do for you?
Good evening / Good evening! What can I do for you?
How are you? / I am well, thank you. What can I do for you?
Who are you? / I am a very small language model. I answer short questions.
What is your name? / I am the Tributary base model.
What can you do? / I answer short questions, from a given text or from what I was trained on.
Who made you? / The Tributary project trained me with a script that it ships.
Are you a person? / No. I am a small language model.
Thank you! / You are welcome.
Thanks / You are welcome.
Goodbye / Goodbye!
Bye / Goodbye!
Can you help me? / Yes. Please ask your question.
Please help / Of course. Please ask your question.
""".split("\n")
    if line
)
