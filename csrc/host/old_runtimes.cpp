// Lets the libraries load wherever torch's own wheels do, with glibc 2.28 and the libstdc++ of its
// time: what newer headers ask of newer runtimes is defined here, for each of our libraries by
// itself (csrc/exports.map).
#include <new>
#include <sstream>

// Read by shared_ptr, which counts without atomic operations where it is not 0. That of glibc 2.32
// is 0 from the second thread on; 0 is right at any time.
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}

namespace std {

// Called by a vector that is asked for more elements than there are addresses; of libstdc++ 11.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// Of libstdc++ 9.
template basic_stringstream<char>::basic_stringstream();
template basic_ostringstream<char>::basic_ostringstream();

}  // namespace std
